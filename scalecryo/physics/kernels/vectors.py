"""Vector instructions that numba does not find by itself: four neighbouring floats at a time, or two.

A row of a half-complex grid holds the two neighbours of a sample along x side by side (real, imaginary, real,
imaginary), so one load or store of four floats does what four would. numba leaves such runs scalar (its superword
vectoriser is off by default), hence LLVM's vector types, by numba's public `intrinsic`.

numba notices changes here only when the kernels' own files change too: touch them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_INDEX, _LANE = ir.IntType(64), ir.IntType(32)
# A product and a sum may become one instruction, as elsewhere in the kernels.
_FUSE = ("contract",)
_CORNERS = (types.intp,) * 4
_PLACE = (types.float32,) * 3


def _vector(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba's `intrinsic`; its callers pass all but the first argument."""
    return cast(Callable[..., Any], intrinsic(function))


class _Vectors:
    """LLVM code on vectors of two floats (a complex value) or four (two neighbours), at places of one array."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any, width: int = 4) -> None:
        self.builder, self.width = builder, width
        self.kind = ir.VectorType(ir.FloatType(), width)
        self.start = context.make_array(array_type)(context, builder, array).data

    def pointer(self, index: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.start, [index]), self.kind.as_pointer())

    def load(self, index: Any) -> Any:
        return self.builder.load(self.pointer(index), align=4)

    def add_to(self, index: Any, value: Any) -> None:
        where = self.pointer(index)
        self.builder.store(self.builder.fadd(self.builder.load(where, align=4), value), where, align=4)

    def pack(self, values: Sequence[Any]) -> Any:
        packed: Any = ir.Constant(self.kind, ir.Undefined)
        for number, value in enumerate(values):
            packed = self.builder.insert_element(packed, value, ir.Constant(_LANE, number))
        return packed

    def splat(self, value: Any) -> Any:
        return self.pack([value] * self.width)

    def lane(self, value: Any, number: int) -> Any:
        return self.builder.extract_element(value, ir.Constant(_LANE, number))

    def lanes(self, value: Any) -> list[Any]:
        return [self.lane(value, number) for number in range(self.width)]

    def along(self, low: Any, step: Any, share: Any) -> Any:
        """low + step * share."""
        return self.builder.fadd(low, self.builder.fmul(step, share, flags=_FUSE), flags=_FUSE)

    def parts(self, value: Any, share: Any) -> Iterator[Any]:
        """The real and the imaginary part between the two neighbours along x."""
        for part in (0, 1):
            low = self.lane(value, part)
            yield self.along(low, self.builder.fsub(self.lane(value, part + 2), low), share)

    def split(self, value: Any, share: Any) -> tuple[Any, Any]:
        """value * (1 - share), value * share."""
        far = self.builder.fmul(value, share)
        return self.builder.fsub(value, far), far

    def corners(self, at: Any, side: Any, row: Any, plane: Any) -> list[tuple[Any, Any]]:
        """The two x neighbours at (z, y), (z, y + 1), (z + 1, y), (z + 1, y + 1)."""
        far = self.builder.add(at, plane)
        lines = (at, self.builder.add(at, row), far, self.builder.add(far, row))
        return [(self.load(line), self.load(self.builder.add(line, side))) for line in lines]


@_vector
def interpolate(_: Any, volume: Any, a: Any, b: Any, c: Any, d: Any, x: Any, y: Any, z: Any) -> Any:
    """(volume, a, b, c, d, x, y, z): trilinear interpolation of complex values; returns real, imaginary.

    volume: flat, pairs of real numbers. a to d: where the lower x neighbour's real part stands at (z, y), (z, y + 1),
    (z + 1, y), (z + 1, y + 1). x, y, z: places between neighbours, 0 to 1.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        vectors = _Vectors(context, builder, signature.args[0], arguments[0])
        a, b, c, d = (vectors.load(corner) for corner in arguments[1:5])
        x, y, z = arguments[5], vectors.splat(arguments[6]), vectors.splat(arguments[7])
        near, far = (vectors.along(low, builder.fsub(high, low), y) for low, high in ((a, b), (c, d)))
        value = vectors.along(near, builder.fsub(far, near), z)
        return context.make_tuple(builder, signature.return_type, list(vectors.parts(value, x)))

    return types.UniTuple(types.float32, 2)(volume, *_CORNERS, *_PLACE), generate


@_vector
def interpolate_with_slopes(_: Any, volume: Any, a: Any, b: Any, c: Any, d: Any, x: Any, y: Any, z: Any) -> Any:
    """As `interpolate`; returns the value and its derivatives along x, y, z, each real, imaginary."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        vectors = _Vectors(context, builder, signature.args[0], arguments[0])
        a, b, c, d = (vectors.load(corner) for corner in arguments[1:5])
        x, y, z = arguments[5], vectors.splat(arguments[6]), vectors.splat(arguments[7])
        rise_near, rise_far = builder.fsub(b, a), builder.fsub(d, c)
        near, far = vectors.along(a, rise_near, y), vectors.along(c, rise_far, y)
        slope_z = builder.fsub(far, near)
        value, slope_y = vectors.along(near, slope_z, z), vectors.along(rise_near, builder.fsub(rise_far, rise_near), z)
        slope_x = [builder.fsub(vectors.lane(value, part + 2), vectors.lane(value, part)) for part in (0, 1)]
        found = [*vectors.parts(value, x), *slope_x, *vectors.parts(slope_y, x), *vectors.parts(slope_z, x)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.float32, 8)(volume, *_CORNERS, *_PLACE), generate


@_vector
def interpolate_pairs(_: Any, volume: Any, at: Any, side: Any, row: Any, plane: Any, x: Any, y: Any, z: Any) -> Any:
    """As `interpolate`, for x neighbours that may stand apart: side, row and plane lead from `at` to the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        pairs = _Vectors(context, builder, signature.args[0], arguments[0], width=2)
        corners, (x, y, z) = pairs.corners(*arguments[1:5]), (pairs.splat(share) for share in arguments[5:])
        lines = [pairs.along(low, builder.fsub(high, low), x) for low, high in corners]
        near, far = (pairs.along(a, builder.fsub(b, a), y) for a, b in (lines[:2], lines[2:]))
        found = pairs.lanes(pairs.along(near, builder.fsub(far, near), z))
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.float32, 2)(volume, *_CORNERS, *_PLACE), generate


@_vector
def interpolate_pairs_with_slopes(
    _: Any, volume: Any, at: Any, side: Any, row: Any, plane: Any, x: Any, y: Any, z: Any
) -> Any:
    """As `interpolate_with_slopes`, for the neighbours of `interpolate_pairs`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        pairs = _Vectors(context, builder, signature.args[0], arguments[0], width=2)
        corners, (x, y, z) = pairs.corners(*arguments[1:5]), (pairs.splat(share) for share in arguments[5:])
        steps = [builder.fsub(high, low) for low, high in corners]
        lines = [pairs.along(low, step, x) for (low, _), step in zip(corners, steps, strict=True)]
        rise_near, rise_far = builder.fsub(lines[1], lines[0]), builder.fsub(lines[3], lines[2])
        near, far = pairs.along(lines[0], rise_near, y), pairs.along(lines[2], rise_far, y)
        step_near, step_far = (pairs.along(a, builder.fsub(b, a), y) for a, b in (steps[:2], steps[2:]))
        slope_z = builder.fsub(far, near)
        slope_x = pairs.along(step_near, builder.fsub(step_far, step_near), z)
        slope_y = pairs.along(rise_near, builder.fsub(rise_far, rise_near), z)
        wanted = (pairs.along(near, slope_z, z), slope_x, slope_y, slope_z)
        found = [lane for value in wanted for lane in pairs.lanes(value)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.float32, 8)(volume, *_CORNERS, *_PLACE), generate


@_vector
def as_float(_: Any, bits: Any) -> Any:
    """The single precision number that 32 bits stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_vector
def prefetch(_: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of a value that is needed soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        start = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        where = builder.bitcast(builder.gep(start, [arguments[1]]), ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [where.type, flag, flag, flag])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(fetch, [where, *(ir.Constant(flag, value) for value in (0, 3, 1))])  # to read, keep, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_vector
def add_row(_: Any, grid: Any, row: Any, real: Any, imaginary: Any, x: Any) -> Any:
    """(grid, row, real, imaginary, x): add to two neighbours along x of a flat grid of pairs of real numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        vectors = _Vectors(context, builder, signature.args[0], arguments[0])
        row, *pair, x = arguments[1:]
        shares = [vectors.split(part, x) for part in pair]
        vectors.add_to(row, vectors.pack((shares[0][0], shares[1][0], shares[0][1], shares[1][1])))
        return context.get_dummy_value()

    return types.void(grid, types.intp, *_PLACE), generate


@_vector
def add_record(_: Any, grid: Any, at: Any, line: Any, plane: Any, records: Any, first: Any) -> Any:
    """(grid, at, line, plane, records, first): share a record of four floats among a sample's eight neighbours.

    grid: flat, four floats a voxel. at: where the lowest neighbour stands. line, plane: floats between neighbours along
    y and along z. records: flat; from `first` on stand the four floats, then x, y, z (0 to 1).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        (at, line, plane), first = arguments[1:4], arguments[5]
        vectors = _Vectors(context, builder, signature.args[0], arguments[0])
        records = _Vectors(context, builder, signature.args[4], arguments[4])
        beyond = (builder.add(first, ir.Constant(_INDEX, number)) for number in (4, 5, 6))
        x, y, z = (vectors.splat(builder.load(builder.gep(records.start, [index]))) for index in beyond)
        row = at
        for share in vectors.split(records.load(first), z):
            low, high = vectors.split(share, y)
            for value, here in ((low, row), (high, builder.add(row, line))):
                left, right = vectors.split(value, x)
                vectors.add_to(here, left)
                vectors.add_to(builder.add(here, ir.Constant(_INDEX, 4)), right)
            row = builder.add(at, plane)
        return context.get_dummy_value()

    return types.void(grid, types.intp, types.intp, types.intp, records, types.intp), generate
