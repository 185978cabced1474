"""A device that refuses what a GPU refuses, with its memory on the host: the package runs on it unchanged.

A tensor moved to "meta" within `EmulatedDevice` keeps its values. It can be neither read by numpy nor mixed with
tensors of the host in one operation, and a collective takes no tensor of the host, as NCCL alone would. Kernels are
the reference's: what is tested is where tensors lie, not what a GPU computes.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
GATHER_OBJECTS = dist.all_gather_object
# What copies between devices, or takes indices and a bound from the host.
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"_to_copy", "copy_", "copy", "lift_fresh", "_has_compatible_shallow_copy_type", "set_"} | _BY_INDEX
_COLLECTIVES = {"all_reduce_", "reduce_", "broadcast_", "all_reduce_async", "all_gather", "all_gather_names"}
PACKAGE = Path(__file__).resolve().parents[2] / "scalecryo"
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}


class HostTensorRefusedError(RuntimeError):
    pass


class OnDevice(Tensor):
    """A tensor of the device; `host` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, Counter())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)  # as `torch.load(…, map_location="cpu")` gives it back


def run(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    """An operation, on the values; its results lie where a GPU's would."""
    name = func.overloadpacket.__name__
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [leaf for leaf in given if isinstance(leaf, OnDevice)]
    wanted = kwargs.get("device")
    aims = wanted is not None and torch.device(wanted).type == DEVICE.type
    if func.namespace == "c10d" and len(there) < len(given):
        raise HostTensorRefusedError(f"{name}: no backend for a tensor of the CPU")
    if name not in _COPIES and there and any(leaf.dim() for leaf in given if not isinstance(leaf, OnDevice)):
        raise HostTensorRefusedError(f"{func}: tensors of the device and of the CPU")
    generator = kwargs.get("generator")
    if (aims or there) and generator is not None:
        raise HostTensorRefusedError(f"{func}: a generator of the CPU cannot fill a tensor of the device")
    to_host = name == "_to_copy" and wanted is not None and not aims
    if there and (name in _READS or to_host or (name in _BY_INDEX and _by_mask(args))):
        waits[name] += 1
    wrapped = {id(leaf.host): leaf for leaf in there}
    inner = tree_map(lambda leaf: leaf.host if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    if aims:
        inner[1]["device"] = torch.device("cpu")
    found = func(*inner[0], **inner[1])
    if name == "_local_scalar_dense" or to_host or not (there or aims):
        return found
    if name in ("copy_", "set_") and not isinstance(args[0], OnDevice):
        return args[0]

    def back(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, OnDevice):
            return leaf
        own = wrapped.get(id(leaf))
        return OnDevice(leaf.resolve_conj().resolve_neg()) if own is None else own

    return tree_map(back, found)


def _by_mask(args: Any) -> bool:
    """Whether results are as many as a mask of the device has true values; one value for all of them is filled in."""
    masks = [index for index in args[1] if isinstance(index, OnDevice) and index.dtype in (torch.bool, torch.uint8)]
    filled = len(args) > 2 and len(masks) == 1 and args[2].numel() == 1
    return bool(masks) and not filled


class _BeforeDispatch(TorchFunctionMode):
    """What torch does without dispatching: `torch.tensor(…, device=…)` fills memory, `tolist` reads it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(DEVICE)
        if func is Tensor.__format__ and isinstance(args[0], OnDevice):
            return format(args[0].cpu(), *args[1:])
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].cpu().tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            # Made into a tensor on "meta" without dispatching, which leaves its memory unfilled.
            return func(args[0], torch.tensor(args[1]).to(args[0].device), *args[2:])
        return func(*args, **kwargs)


class EmulatedDevice(TorchDispatchMode):
    """While it is on, "meta" is a device with memory.

    Attributes:
        waits: how often the host waited for the device, by operation.
        collectives: how often tensors of the device were reduced or gathered.
        objects: how often Python objects were gathered, which is done on the host.
        places: the package's functions, as `file: function`, that such a call came from, by way of others or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.objects = 0
        self.places: set[str] = set()
        # Adam's fused kernel asks for the name of the device.
        supported = [DEVICE.type, "cpu", "cuda"]
        self._gathered = patch("torch.distributed.all_gather_object", self._gather_objects)
        self._fused = patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: supported)
        self._narrow = patch("torch.autocast", lambda *_args, **_kwargs: nullcontext())  # asks for a name too
        self._before = _BeforeDispatch()

    def __enter__(self) -> "EmulatedDevice":
        super().__enter__()
        self._before.__enter__()
        self._fused.start()
        self._narrow.start()
        self._gathered.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._gathered.stop()
        self._narrow.stop()
        self._fused.stop()
        self._before.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives[func.overloadpacket.__name__] += 1
            self.places |= set(_callers())
        return run(func, args, kwargs or {}, self.waits)

    def _gather_objects(self, gathered: list[Any], mine: Any) -> None:
        """By the group's backend of the host, as `cpu:gloo,cuda:nccl` has one."""
        self.objects += 1
        self.places |= set(_callers())
        with _disable_current_modes():
            GATHER_OBJECTS(gathered, mine)


def _callers() -> Iterator[str]:
    """The package's functions that are being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            yield f"{path.relative_to(PACKAGE)}: {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]


def collective_places() -> set[str]:
    """The package's functions that name a collective of `World`, or torch's own, as `file: function`."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(map(_is_collective, ast.walk(node))):
                found.add(f"{path.relative_to(PACKAGE)}: {node.name}")
    return found


def _is_collective(node: ast.AST) -> bool:
    if not isinstance(node, ast.Attribute):
        return False
    owner = node.value
    name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    torchs_own = name == "dist" and node.attr.startswith(("all_", "reduce", "broadcast"))
    return torchs_own or (node.attr in _COLLECTIVES and "world" in name)


def averaging(module: nn.Module, _reduce_dtype: str) -> nn.Module:
    """In the place of DDP, which looks at a device's name by itself: workers start alike, gradients are averaged."""
    own = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name not in own:
            dist.broadcast(parameter.data, 0)
            parameter.register_post_accumulate_grad_hook(_average)
    return module


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()
