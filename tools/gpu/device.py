"""The device by itself, and the package's own GPU tests on it."""

import os
import platform
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from tools.gpu.session import Row, Session, roofline

ROOT = Path(__file__).resolve().parents[2]
INI = """[pytest]
markers =
    gpu: needs a CUDA device
    ray: uses Ray
filterwarnings =
    error
    ignore::pytest.PytestAssertRewriteWarning
"""


def versions(session: Session) -> Row:
    """What the figures belong to."""
    found: Row = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "numpy", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if session.on_gpu:
        properties = torch.cuda.get_device_properties(session.device)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}",
                  "memory_gb": round(properties.total_memory / 1e9, 1),
                  "multiprocessors": properties.multi_processor_count, "driver": _driver()}  # fmt: skip
    else:
        found |= {"device": f"CPU {platform.machine()}", "threads": torch.get_num_threads()}
    return found


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip().splitlines()[0] if said.stdout.strip() else None


def identity(session: Session) -> Iterator[Row]:
    """What figures hold for."""
    yield versions(session)


def device(session: Session) -> Iterator[Row]:
    """What copies and matrix products reach."""
    reach = roofline(session)
    yield {"what": "copy, GB/s", "value": round(reach.bandwidth / 1e9, 1)}
    for kind in ("float32", "tf32", "bfloat16"):
        yield {"what": f"product in {kind}, TFLOP/s", "value": round(getattr(reach, kind) / 1e12, 3)}
    small = torch.zeros(1, device=session.device)
    yield {"what": "launch and wait, µs", "value": round(1e6 * session.seconds(lambda: small.add_(1)), 1)}
    host = torch.empty(session.sizes.copy_numbers // 8, pin_memory=session.on_gpu)
    there = torch.empty_like(host, device=session.device)
    taken = session.seconds(lambda: there.copy_(host, non_blocking=True))
    yield {"what": "host to device, pinned, GB/s", "value": round(4 * host.numel() / taken / 1e9, 1)}


def tests(session: Session) -> Iterator[Row]:
    """`pytest -m gpu tests/gpu`, by test; without the plug-ins and settings that a bare machine lacks."""
    folder = session.work / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    ini, report = folder / "pytest.ini", folder / "report.xml"
    ini.write_text(INI)
    words = ["-q", "-c", str(ini), "--rootdir", str(ROOT), "-p", "no:cacheprovider", f"--junitxml={report}", "-m",
             "gpu", str(ROOT / "tests" / "gpu")]  # fmt: skip
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    code = pytest.main(words)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    results: Counter[str] = Counter()
    for case in cases:
        failed = [child for child in case if child.tag in ("failure", "error", "skipped")]
        said = {"failure": "failed", "error": "failed", "skipped": "skipped"}[failed[0].tag] if failed else "passed"
        results[said] += 1
        reason = (failed[0].get("message") or "").strip().splitlines()[:1] if failed else []
        yield {"test": case.get("name"), "result": said, "seconds": round(float(case.get("time") or 0), 2),
               "why": "".join(reason)[:200]}  # fmt: skip
    told = ", ".join(f"{results[said]} {said}" for said in ("passed", "failed", "skipped"))
    # 1: tests failed, which is told.
    yield {"test": f"all {len(cases)}", "result": told if code in (0, 1) else f"pytest ended with {int(code)}",
           "seconds": None, "why": ""}  # fmt: skip
