"""Fuzz the readers of other packages' files: whatever bytes come, an answer or one ScalecryoError, and soon.

    python -m tests.support.fuzz_parsers KIND [--seconds 60] [--seeds DIR ...] [--keep DIR] [--seed 0]

KIND is star, mrc, cs, csg or pkl. Seeds are files of that kind below the folders given (small ones), beside a few made
here. With atheris installed (not a dependency: `pip install atheris`) the readers are instrumented and the search is
guided by coverage; without it, or with --plain, seeds are mutated at random. Either way memory is limited to 6 GB, and
an input that raises anything else, takes longer than 5 s, or answers with an array that its bytes cannot hold, is
written to --keep and printed. Ends with 1 if there was any.
"""

import argparse
import hashlib
import io
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np

try:
    import atheris
except ImportError:
    atheris = None

_LIMIT = 200_000  # bytes of a seed
_SLOWEST = 5
STAR = b"""
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnVoltage #2
_rlnSphericalAberration #3
_rlnAmplitudeContrast #4
_rlnImagePixelSize #5
1 300.0 2.7 0.1 1.06
2 200.0 2.7 0.1 1.10

data_particles

loop_
_rlnImageName #1
_rlnOpticsGroup #2
_rlnDefocusU #3
_rlnDefocusV #4
_rlnDefocusAngle #5
_rlnAngleRot #6
_rlnAngleTilt #7
_rlnAnglePsi #8
_rlnOriginXAngst #9
_rlnOriginYAngst #10
_rlnRandomSubset #11
000001@a.mrcs 1 15000.0 14000.0 10.0 1.0 2.0 3.0 0.5 -0.5 1
'000002@b c.mrcs' 2 15000.0 14000.0 10.0 1.0 2.0 3.0 0.5 -0.5 2 # a comment

"""


class _TooSlow(BaseException):
    """Past the time that any file may take."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise _TooSlow


def _star(data: bytes) -> None:
    from scalecryo.data.formats import relion

    table = relion.read_particles("fuzzed.star", data)
    assert len(table) <= len(data)
    if len(table) and table.has_pose:
        columns = table.columns
        with tempfile.TemporaryDirectory(dir=_SHARED) as folder:
            out = str(Path(folder) / "out.star")
            confidence = np.ones(len(table))
            relion.write_with_poses(
                out, data, table, columns["rotation"], columns["shift"], confidence, columns["half"]
            )
            again = relion.read_particles(out)
        for name in ("stack_index", "half", "defocus_u"):
            if name in columns and not (name == "half" and (columns["half"] == 0).any()):
                assert np.array_equal(columns[name], again.columns[name]), name
        assert table.image_names() == again.image_names()


def _mrc(data: bytes) -> None:
    from scalecryo.data.formats.mrc import Stack, read_map

    with tempfile.NamedTemporaryFile(dir=_SHARED, suffix=".mrcs") as file:
        file.write(data)
        file.flush()
        stack = Stack.open(file.name)
        images = stack.read([0, stack.count - 1])
        assert images.nbytes <= 8 * 1100 * max(len(data), 1)
        if stack.count * stack.ny * stack.nx < 1 << 24:
            read_map(file.name)


def _cs(data: bytes) -> None:
    from scalecryo.data.formats import cryosparc, csrows

    rows = csrows.decode(data, "fuzzed.cs")
    table = cryosparc.table_of(rows, "fuzzed.cs")
    cryosparc.sign_of(rows, "fuzzed.cs")
    cryosparc.confidence_of(rows, "fuzzed.cs")
    assert len(table) <= len(data)


def _csg(data: bytes) -> None:
    from scalecryo.data.formats import csrows

    with tempfile.TemporaryDirectory(dir=_SHARED) as folder:
        path = Path(folder) / "group.csg"
        path.write_bytes(data)
        csrows.read(str(path))


def _pkl(data: bytes) -> None:
    from scalecryo.data.formats import cryodrgn, plainpickle

    plainpickle.load(data, "fuzzed.pkl")
    with tempfile.NamedTemporaryFile(dir=_SHARED, suffix=".pkl") as file:
        file.write(data)
        file.flush()
        cryodrgn.read_poses(file.name)


_SHARED = "/dev/shm" if os.path.isdir("/dev/shm") else None
TARGETS: dict[str, Callable[[bytes], None]] = {"star": _star, "mrc": _mrc, "cs": _cs, "csg": _csg, "pkl": _pkl}
_ENDINGS = {
    "star": (".star",), "mrc": (".mrc", ".mrcs", ".map", ".gz", ".bz2"), "cs": (".cs",), "csg": (".csg",),
    "pkl": (".pkl",),
}  # fmt: skip


def made(kind: str) -> list[bytes]:
    """A small good file of every kind."""
    if kind == "star":
        return [STAR, STAR.replace(b"\n", b"\r\n"), STAR[STAR.index(b"data_particles") :]]
    if kind == "csg":
        return [b"group:\n  type: particle\nresults:\n  blob:\n    metafile: '>a.cs'\n    num_items: 3\nversion: v4\n"]
    if kind == "pkl":
        arrays = (np.stack([np.eye(3, dtype=np.float32)] * 3), np.zeros((3, 2), np.float32))
        return [pickle.dumps(arrays, protocol=protocol) for protocol in (0, 2, 3, 4, 5)]
    if kind == "cs":
        fields = [("uid", "<u8"), ("blob/path", "S12"), ("blob/idx", "<u4"), ("blob/psize_A", "<f4")]
        fields += [("blob/sign", "<f4"), ("alignments3D/shift", "<f4", (2,)), ("alignments3D/pose", "<f4", (3,))]
        rows = np.ones(3, np.dtype(fields))
        rows["blob/path"] = b"J1/a.mrc"
        buffer = io.BytesIO()
        np.save(buffer, rows, allow_pickle=False)
        return [buffer.getvalue()]
    header = np.zeros(256, "<i4")
    header[:4] = 4, 4, 2, 2
    header[7:10] = 4, 4, 1
    header[16:19] = 1, 2, 3
    header[52:54] = 0x2050414D, 0x4444
    return [header.tobytes() + bytes(2 * 16 * 4), header.astype(">i4").tobytes() + bytes(2 * 16 * 4)]


def _seeds(kind: str, folders: list[str]) -> list[bytes]:
    found = made(kind)
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.name.endswith(_ENDINGS[kind]) and path.is_file() and path.stat().st_size <= _LIMIT:
                found.append(path.read_bytes())
    return found


_PIECES = [b"", b"\0", b"\n", b" ", b"\t", b'"', b"'", b"#", b"@", b"-1", b"1e999", b"nan", b"99999999999999999999",
           b"data_", b"loop_", b"_rlnImageName", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f",
           b"\x80\0\0\0", b"../", b"//", b"1_0", b"\xc3\x28", b"|O", b"(9999999999,)", b"(-1,)"]  # fmt: skip


def mutate(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A seed with one to eight changes: bytes flipped, pieces put in, cut out, doubled or taken from another."""
    out = bytearray(data)
    for _ in range(1 << draw.randrange(4)):
        place, length = draw.randrange(len(out) + 1), 1 << draw.randrange(8)
        match draw.randrange(7):
            case 0 if place < len(out):
                out[place] ^= 1 << draw.randrange(8)
            case 1 if place < len(out):
                out[place] = draw.randrange(256)
            case 2:
                out[place:place] = draw.choice(_PIECES)
            case 3:
                piece = draw.choice(_PIECES)
                out[place : place + len(piece)] = piece
            case 4:
                del out[place : place + length]
            case 5:
                out[place:place] = out[place : place + length]
            case 6:
                other = draw.choice(others)
                start = draw.randrange(len(other) + 1)
                out[place : place + length] = other[start : start + length]
            case _:
                pass
    return bytes(out)


class Campaign:
    """Runs inputs, counts them, and keeps those that found something."""

    def __init__(self, kind: str, keep: str | None) -> None:
        from scalecryo.errors import ScalecryoError

        self._target, self._kind, self._keep, self._refusal = TARGETS[kind], kind, keep, ScalecryoError
        self.cases = self.refused = 0
        self.findings: dict[str, str] = {}

    def run(self, data: bytes) -> None:
        self.cases += 1
        signal.setitimer(signal.ITIMER_REAL, _SLOWEST)
        try:
            self._target(data)
        except self._refusal as error:
            self.refused += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                self._found(data, "message of several lines, or very long")
        except _TooSlow:
            self._found(data, f"longer than {_SLOWEST} s")
        except Exception as error:  # noqa: BLE001 - whatever a reader lets through is what is looked for
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            line = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
            self._found(data, f"{type(error).__name__} at {line}: {str(error)[:120]}", f"{type(error).__name__}{line}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _found(self, data: bytes, what: str, key: str | None = None) -> None:
        if (key or what) in self.findings:
            return
        self.findings[key or what] = what
        name = f"{hashlib.sha1(data).hexdigest()[:12]}.{self._kind}"
        print(f"FOUND {self._kind}: {what} ({len(data)} bytes, {name})", flush=True)
        if self._keep:
            Path(self._keep).mkdir(parents=True, exist_ok=True)
            (Path(self._keep) / name).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", nargs="*", default=[])
    parser.add_argument("--keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="mutate at random even where atheris is installed")
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    signal.signal(signal.SIGALRM, _stop)
    guided = atheris is not None and not asked.plain
    if guided:
        import torch  # noqa: F401 - imported before, so that only the readers are instrumented

        with atheris.instrument_imports(include=["scalecryo.data"]):
            pass
    else:
        from scalecryo.data.formats import cryosparc, relion  # noqa: F401 - not on the clock
    campaign = Campaign(asked.kind, asked.keep)
    seeds = _seeds(asked.kind, asked.seeds)
    start = time.monotonic()

    def report() -> None:
        seconds = time.monotonic() - start
        how = "atheris" if guided else "random mutations"
        print(
            f"{asked.kind}: {campaign.cases:,} cases in {seconds:.0f} s by {how} from {len(seeds)} seeds, "
            f"{campaign.refused:,} refused, {len(campaign.findings)} findings",
            flush=True,
        )

    if guided:
        with tempfile.TemporaryDirectory() as corpus:
            for number, data in enumerate(seeds):
                (Path(corpus) / f"{number}").write_bytes(data)

            def once(data: bytes) -> None:
                if time.monotonic() - start > asked.seconds:
                    report()
                    os._exit(1 if campaign.findings else 0)
                campaign.run(data)

            atheris.Setup([sys.argv[0], corpus, f"-seed={asked.seed + 1}", "-rss_limit_mb=0", "-max_len=200000"], once)
            atheris.Fuzz()
    draw = random.Random(asked.seed)
    for data in seeds:
        campaign.run(data)
    while time.monotonic() - start < asked.seconds:
        campaign.run(mutate(draw.choice(seeds), seeds, draw))
    report()
    sys.exit(1 if campaign.findings else 0)


if __name__ == "__main__":
    main()
