"""Compile the Triton kernels ahead of time, without a GPU, and look at the machine code.

    python tools/aot_kernels.py [--targets 80 90 100] [--kernels slice_forward ...] [--no-check]

Prints a table: registers a thread, bytes of local memory (spills, and the sine's array), and memory instructions as PTX
counts them (the 8 neighbours of a sample are 8 loads of a real and an imaginary part together: ld v2). Unless told not
to, exits with 1 where a kernel spills, takes more than 64 registers (128 for local refinement), loads the volume in
single numbers, or adds to it without atomics.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scalecryo.physics.kernels import triton_refine, triton_slice
from scalecryo.physics.kernels.cuda import BLOCK, OPTIONS

_FLOATS = ("scale", "per_px", "radius")
# Seven words in which the sine of CUDA's library reduces large angles. Triton 3.7 compiles that path in, 3.9 does not;
# the kernels' angles are below one turn and never take it. The same kernel without a shift holds nothing.
SINE_ARRAY = 32
_CONSTANTS = {"BLOCK": BLOCK, "BLOCKS": 8}


class Variant(NamedTuple):
    """A kernel with its switches, and what its code must hold: loads of pairs and additions to the volume.

    Additions are counted in numbers: red or atom of two count twice.
    """

    kernel: Any
    switches: dict[str, bool]
    pair_loads: int
    additions: int
    registers: int = 64

    @property
    def array_bytes(self) -> int:
        """Local memory that is no spill: the sine's own array, of kernels that shift images."""
        return 0 if self.kernel is triton_slice.insert else SINE_ARRAY


VARIANTS = {
    "slice_forward": Variant(triton_slice.slice_forward, {"HAS_SHIFT": True, "HAS_CTF": True}, 8, 0),
    "slice_backward": Variant(
        triton_slice.slice_backward,
        {"HAS_SHIFT": True, "HAS_CTF": True, "FOR_VOLUME": True, "FOR_POSE": True}, 9, 16,
    ),
    "slice_backward, volume": Variant(
        triton_slice.slice_backward,
        {"HAS_SHIFT": True, "HAS_CTF": True, "FOR_VOLUME": True, "FOR_POSE": False}, 1, 16,
    ),
    "insert": Variant(triton_slice.insert, {}, 1, 24),
    "refinement_sums": Variant(triton_refine.refinement_sums, {"HAS_CTF": True, "DERIVATIVES": True}, 9, 0, 128),
    "refinement_sums, cost": Variant(triton_refine.refinement_sums, {"HAS_CTF": True, "DERIVATIVES": False}, 9, 0),
}  # fmt: skip


class Code(NamedTuple):
    """What the machine code of a kernel holds."""

    registers: int
    local_bytes: int
    pair_loads: int
    single_loads: int
    pair_additions: int
    single_additions: int


def compiled(variant: Variant, capability: int) -> Code:
    """Compile for a compute capability, pointers aligned to 16 bytes as torch's are, and count."""
    names = variant.kernel.arg_names
    constants = {name: {**_CONSTANTS, **variant.switches}[name] for name in names if name.isupper()}
    signature = {
        name: "constexpr" if name.isupper() else "*fp32" if name.endswith("_ptr")
        else "fp32" if name in _FLOATS else "i32"
        for name in names
    }  # fmt: skip
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    registers, spilled = _resources(code.asm["cubin"])
    ptx = code.asm["ptx"]
    additions = [len(re.findall(rf"\b(?:red|atom)\.\S*add\S*{kind}", ptx)) for kind in (r"\.v2\.f32", r"(?<!v2)\.f32")]
    loads = [len(re.findall(rf"\bld\.global\S*{kind}", ptx)) for kind in (r"\.v2\.", r"(?<!v2)\.b32")]
    return Code(registers, spilled, *loads, *additions)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory and stack, as Triton's own cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", found)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def faults(variant: Variant, code: Code) -> list[str]:
    """What is wrong with the code, in words."""
    found = []
    if code.local_bytes not in (0, variant.array_bytes):
        found.append(f"spills {code.local_bytes - variant.array_bytes} bytes")
    if code.registers > variant.registers:
        found.append(f"takes {code.registers} registers, more than {variant.registers}")
    if code.pair_loads != variant.pair_loads:
        found.append(f"loads {code.pair_loads} pairs, not {variant.pair_loads}")
    if 2 * code.pair_additions + code.single_additions != variant.additions:
        found.append(f"adds {2 * code.pair_additions + code.single_additions} numbers, not {variant.additions}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--kernels", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--no-check", action="store_true")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}, {BLOCK} threads a program")
    print("| kernel | sm | registers | local memory, B | ld v2 | ld | red/atom v2 | red/atom |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    wrong = []
    for name in arguments.kernels:
        for capability in arguments.targets:
            code = compiled(VARIANTS[name], capability)
            print(f"| {name} | {capability} | {' | '.join(str(number) for number in code)} |", flush=True)
            wrong += [f"{name} for sm_{capability} {fault}" for fault in faults(VARIANTS[name], code)]
    if wrong and not arguments.no_check:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
