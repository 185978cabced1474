"""What torch's profiler saw: how long the device was busy, what it waited for, and what took its time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile

from tools.gpu.session import Row

Span = tuple[float, float]
#: What makes the host wait for the device, as the CUDA runtime's and torch's own events are called.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense",
         "aten::nonzero")  # fmt: skip
TOP, LEAST_GAP_US = 12, 50.0


def covered(spans: Sequence[Span]) -> list[Span]:
    """The union of spans, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def gaps(busy: Sequence[Span], least: float = LEAST_GAP_US) -> list[Span]:
    """Where nothing ran between the first and the last span, for at least so many microseconds."""
    return [(a[1], b[0]) for a, b in pairwise(busy) if b[0] - a[1] >= least]


def blamed(idle: Sequence[Span], host: Sequence[tuple[float, float, str]]) -> Counter[str]:
    """Microseconds of idle time by the innermost operation of the host in the middle of each gap."""
    found: Counter[str] = Counter()
    ordered = sorted(host)
    for start, end in idle:
        middle = (start + end) / 2
        around = [(e - s, name) for s, e, name in ordered if s <= middle < e]
        found[min(around)[1] if around else "Python, or waiting for data"] += end - start  # type: ignore[assignment]
    return found


def timeline(seen: profile, seconds: float, *, on_gpu: bool) -> Iterator[Row]:
    """Rows of the report: share of the time that the device was busy, waits by name, idle time, longest operations."""
    events = seen.events()
    host = [(e.time_range.start, e.time_range.end, e.name) for e in events if e.device_type == DeviceType.CPU]
    names = Counter(name for _, _, name in host)
    if on_gpu:
        device = [(e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA]
        busy = covered(device)
        share = sum(end - start for start, end in busy) / 1e6 / seconds
        yield {"what": "device busy, share of the iteration", "value": round(share, 3)}
        idle = gaps(busy)
        yield {"what": f"gaps of the device of at least {LEAST_GAP_US:g} µs, ms",
               "value": round(sum(end - start for start, end in idle) / 1e3, 1)}  # fmt: skip
        for name, taken in blamed(idle, host).most_common(TOP):
            yield {"what": f"device idle while the host is in {name}, ms", "value": round(taken / 1e3, 2)}
    for name in WAITS:
        yield {"what": f"calls of {name}", "value": names[name]}
    copies = sum(1 for e in events if "Memcpy DtoH" in e.name)
    yield {"what": "copies from the device to the host", "value": copies}
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    for average in sorted(seen.key_averages(), key=lambda one: -_time(one, key))[:TOP]:
        yield {"what": f"{average.key[:80]}, ms", "value": round(_time(average, key) / 1e3, 3), "calls": average.count}


def _time(average: Any, key: str) -> float:
    return float(getattr(average, key))
