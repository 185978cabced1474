"""A Ray cluster made of processes, as `ray start` makes it: nodes that can be killed, jobs that can be submitted."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

Found = TypeVar("Found")
OBJECT_STORE_BYTES = 100 * 2**20
PATIENCE_SECONDS = 1200.0  # only what hangs takes so long, on a busy machine too


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, look: Callable[[], Found], seconds: float = PATIENCE_SECONDS, pause: float = 0.02) -> Found:
    """What `look` finds as soon as it is true; the test fails where that takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(pause)
    pytest.fail(f"waited {seconds:g} s in vain for {what}")


def kill_tree(root: "subprocess.Popen[bytes]") -> None:
    """kill -9 of a process, which must be running, and of all that it started."""
    assert root.poll() is None, f"{root.args!r} had ended with {root.returncode} before it could be killed"
    below = psutil.Process(root.pid).children(recursive=True)
    for process in (root, *below):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its parent
            process.kill()
    assert root.wait() == -signal.SIGKILL
    psutil.wait_procs(below, timeout=20)


class RayNodes:
    """A head of one CPU with a dashboard and a token, and nodes of one CPU each; all on this machine.

    `env` is what a client and every process of the cluster need, the token and the S3 credentials too.
    """

    def __init__(self, env: dict[str, str]) -> None:
        # Ray's sockets lie in it, and a socket's path has at most 107 characters: pytest's own folders are too deep.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.env = {
            **os.environ,
            **env,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.clients: list[subprocess.Popen[bytes]] = []
        self.dashboard = f"http://127.0.0.1:{free_port()}"

    def start_head(self) -> None:
        """Start the head without waiting for it."""
        self._start(
            "--head", "--port=0", f"--temp-dir={self.folder}", f"--ray-client-server-port={free_port()}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard.rpartition(':')[2]}",
        )  # fmt: skip

    def wait_for_head(self) -> None:
        """Wait until it can be joined and its dashboard answers."""
        address = self.folder / "ray_current_cluster"
        self.env["RAY_ADDRESS"] = wait_for("the head", lambda: address.read_text().strip() if address.exists() else "")
        wait_for("the dashboard", lambda: self.ask("/api/version"), pause=0.2)

    def add_node(self) -> "subprocess.Popen[bytes]":
        """Start one more node without waiting for it."""
        return self._start(f"--address={self.env['RAY_ADDRESS']}")

    def wait_for_node(self, node: "subprocess.Popen[bytes]") -> None:
        """Wait until it has joined."""
        log = self.folder / f"node{self.nodes.index(node)}.log"
        wait_for("the node", lambda: "Ray runtime started" in log.read_text())

    def _start(self, *flags: str) -> "subprocess.Popen[bytes]":
        # --block: the node's processes are all below this one, so that killing it kills a machine.
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1",
                   f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats",
                   # Its default is one number for all: jobs wait in vain where another cluster's agent has it.
                   f"--dashboard-agent-listen-port={free_port()}", *flags]  # fmt: skip
        with (self.folder / f"node{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        self.nodes.append(node)
        return node

    def training(self, node: "subprocess.Popen[bytes] | None" = None) -> set[int]:
        """The processes that train now, on one node or on all."""
        found = set()
        for place in [node] if node is not None else [node for node in self.nodes if node.poll() is None]:
            for process in psutil.Process(place.pid).children(recursive=True):
                try:
                    if "TrainWorker" in " ".join(process.cmdline()):
                        found.add(process.pid)
                except psutil.NoSuchProcess:
                    continue
        return found

    def ask(self, path: str, *, token: bool = True) -> str:
        """What the dashboard answers, else nothing."""
        headers = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"} if token else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.dashboard + path, headers=headers), timeout=5
            ) as it:
                return str(it.read().decode())
        except (urllib.error.URLError, OSError):
            return ""

    def submit(self, *arguments: str, log: Path, token: bool = True) -> "subprocess.Popen[bytes]":
        """`ray job submit`; it ends with the job."""
        env = {key: value for key, value in self.env.items() if token or not key.startswith("RAY_AUTH")}
        env.pop("RAY_ADDRESS", None)
        if not token:  # nor one that lies in the home
            env |= {"RAY_AUTH_TOKEN_PATH": str(self.folder / "none"), "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={self.dashboard}"]
        return self.client([*command, *arguments], env, log)

    def client(self, command: list[str], env: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
        """Start a process that uses the cluster; it ends with it at the latest."""
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        self.clients.append(process)
        return process

    def end_clients(self) -> None:
        """End what still runs, as after a test that failed: it would hold the nodes' processors."""
        for process in self.clients:
            if process.poll() is None:
                kill_tree(process)
        self.clients.clear()

    def jobs(self) -> dict[str, str]:
        """The state of every job that was submitted."""
        rows = json.loads(self.ask("/api/jobs/") or "[]")
        return {row["submission_id"]: row["status"] for row in rows if row.get("submission_id")}

    def places(self) -> list[str]:
        """The state of each placement group that holds resources, or waits for some."""
        answer = json.loads(self.ask("/api/v0/placement_groups") or "{}")
        rows = answer.get("data", {}).get("result", {}).get("result", [])
        return [row["state"] for row in rows if row["state"] != "REMOVED"]

    def stop(self) -> None:
        """End all clients and nodes, newest first, and remove what they wrote."""
        self.end_clients()
        for node in reversed(self.nodes):
            if node.poll() is None:
                kill_tree(node)
        shutil.rmtree(self.folder, ignore_errors=True)
