"""An HTTP proxy before an object store that adds latency and faults, for tests and benchmarks.

    python -m tests.support.fault_proxy --upstream 127.0.0.1:8333 --port 8444 --latency-ms 20

The Host header passes unchanged, so that signed requests stay valid.
"""

import argparse
import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PIECE = 1 << 18


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Args:
        delay: seconds before the answer.
        status: answer with this status instead of asking the server.
        cut: break the connection in the middle of the body.
        flip: turn one bit in the middle of the body.
    """

    delay: float = 0.0
    status: int = 0
    cut: bool = False
    flip: bool = False


#: Method, path and the request's number, from 0, to what happens to it.
Faults = Callable[[str, str, int], Fault]


def no_faults(method: str, path: str, number: int) -> Fault:
    """Everything passes."""
    return Fault()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def _forward(self) -> None:
        proxy = self.server.proxy
        self.path = proxy.renamed(self.path)
        fault = proxy.fault_of(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault.delay:
            time.sleep(fault.delay)
        if fault.status:
            self.send_response(fault.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(*proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            self._answer(upstream.getresponse(), fault)
        finally:
            upstream.close()

    def _answer(self, response: http.client.HTTPResponse, fault: Fault) -> None:
        self.send_response_only(response.status)
        length = response.getheader("Content-Length")
        whole = None if length is not None or self.command == "HEAD" else response.read()
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if whole is not None:
            self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        if self.command == "HEAD":
            return
        size = len(whole) if whole is not None else int(length or 0)
        done = 0
        while done < size:
            piece = whole if whole is not None else response.read(min(_PIECE, size - done))
            if not piece:
                break
            if (fault.cut or fault.flip) and done <= size // 2 < done + len(piece):
                middle = size // 2 - done
                if fault.cut:
                    self.wfile.write(piece[:middle])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                piece = piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]
            self.wfile.write(piece)
            done += len(piece)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], proxy: "FaultProxy") -> None:
        super().__init__(address, _Handler)
        self.proxy = proxy
        self.open: set[socket.socket] = set()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error of the proxy."""


class FaultProxy:
    """The proxy: `faults` may be changed at any time, `down` and `up` take it away and bring it back.

    Args:
        upstream: host and port of the server.
        port: to listen on; 0 chooses one.
        faults: what happens to each request.
        shards: paths `virtual-…/c/i` are read from `small/c/(i mod shards)`; 0: paths stay. Not for signed requests.
    """

    def __init__(self, upstream: tuple[str, int], port: int = 0, faults: Faults = no_faults, shards: int = 0) -> None:
        self.upstream = upstream
        self.faults = faults
        self.shards = shards
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._port = port
        self.up()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self._port}"

    def renamed(self, path: str) -> str:
        """The path that the server is asked for."""
        found = re.fullmatch(r"(/[^/]+)/virtual-\d+(/.*/c/)(\d+)(.*)", path) if self.shards else None
        if found is None:
            return path
        return f"{found[1]}/small{found[2]}{int(found[3]) % self.shards}{found[4]}"

    def fault_of(self, method: str, path: str) -> Fault:
        """What happens to the request that has just come."""
        with self._lock:
            self.requests.append((method, path))
            number = len(self.requests) - 1
        return self.faults(method, path, number)

    def up(self) -> None:
        """Listen."""
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        """Refuse connections and drop those that are open."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            for connection in list(self._server.open):
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # it has gone by itself
                    continue
            self._server = None


@contextmanager
def serve_process(upstream: str, port: int, latency: float, shards: int) -> Iterator[None]:
    """The proxy in a process of its own, so that it takes no time from the one that measures."""
    command = [sys.executable, __file__, "--upstream", upstream, "--port", str(port), "--shards", str(shards),
               "--latency-ms", str(1000 * latency)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.terminate()


def wait_for(connect: Callable[[], Any], bucket: str = "bench", seconds: float = 60.0) -> Any:
    """An fsspec file system, once its server lets it write to a bucket."""
    from botocore.exceptions import BotoCoreError

    deadline = time.monotonic() + seconds
    while True:
        fs = connect()
        try:
            fs.makedirs(bucket, exist_ok=True)
            fs.pipe_file(f"{bucket}/ready", b"x")
        except (OSError, BotoCoreError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
            continue
        return fs


def main() -> None:
    """Command line: a proxy that adds latency, until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", default="127.0.0.1:8333")
    parser.add_argument("--port", type=int, default=8444)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--shards", type=int, default=0, help="show a small store's so many shards as a large one's")
    args = parser.parse_args()
    host, _, port = args.upstream.partition(":")
    fault = Fault(delay=args.latency_ms / 1000)
    proxy = FaultProxy((host, int(port)), args.port, lambda *request: fault, args.shards)
    print(proxy.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
