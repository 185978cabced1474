"""A condition on particle columns, as text: `defocus_u < 20000 and class == 2`.

The text is parsed, never evaluated as Python: numbers, column names, + - * /, comparisons, and, or, not.
"""

import ast
import operator
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from scalecryo.data.particles import Columns
from scalecryo.errors import ConfigError

_LONGEST = 2000
_KEYWORDS = {"class_": "class"}  # columns whose name Python would not let stand
_NUMBERS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip


@dataclass(frozen=True)
class Query:
    """A parsed condition.

    Args:
        text: as it was written.
        tree: what it says.
        columns: names that it needs.
    """

    text: str
    tree: ast.expr
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, known: Collection[str], where: str = "config: train.query =") -> "Query":
        """Read a condition.

        Args:
            text: the condition.
            known: columns that it may name.
            where: it was written, for errors.

        Raises:
            ConfigError: it is no condition on these columns.
        """
        if len(text) > _LONGEST:
            raise ConfigError(f"{where} {text[:40]!r}…: {len(text)} characters long, and {_LONGEST} are read")
        try:
            tree = ast.parse(re.sub(r"\bclass\b", "class_", text.strip()), mode="eval").body
            needed: set[str] = set()
            kind = _check(tree, needed)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            said = error.msg if isinstance(error, SyntaxError) else str(error)
            raise ConfigError(
                f"{where} {text!r}: {said}: write conditions on columns, such as `defocus_u < 20000 and half == 1`"
            ) from None
        unknown = sorted(needed - set(known))
        if unknown:
            raise ConfigError(f"{where} {text!r}: no column {unknown[0]}; there are {', '.join(sorted(known))}")
        if kind is not bool or not needed:
            raise ConfigError(f"{where} {text!r}: not a condition on a column: compare something")
        return cls(text, tree, tuple(sorted(needed)))

    def evaluate(self, columns: Columns) -> npt.NDArray[np.bool_]:
        """Where the condition holds; a comparison with NaN does not."""
        with np.errstate(all="ignore"):
            found = np.asarray(_value(self.tree, columns), dtype=bool)
        return np.broadcast_to(found, columns[self.columns[0]].shape)


def _check(node: ast.expr, needed: set[str]) -> type:
    """Whether a node is a number (float) or a condition (bool); collects the names.

    Raises:
        ValueError: it is neither.
    """
    match node:
        case ast.BoolOp(values=parts):
            wanted, found = bool, parts
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            wanted, found = bool, [operand]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _all(float, [operand], float, needed)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _NUMBERS:
            return _all(float, [left, right], float, needed)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
            return _all(float, [left, *others], bool, needed)
        case ast.Name(id=name):
            needed.add(_KEYWORDS.get(name, name))
            return float
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            float(value)  # too large a number fails here
            return float
        case _:
            raise ValueError(f"`{ast.unparse(node)[:40]}` is not understood")
    return _all(wanted, found, bool, needed)


def _all(wanted: type, parts: list[ast.expr], result: type, needed: set[str]) -> type:
    for part in parts:
        if _check(part, needed) is not wanted:
            what = "a condition" if wanted is bool else "a number"
            raise ValueError(f"`{ast.unparse(part)[:40]}` is not {what}")
    return result


def _value(node: ast.expr, columns: Columns) -> Any:
    match node:
        case ast.BoolOp(op=op, values=parts):
            joined = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return reduce(joined, [_value(part, columns) for part in parts])
        case ast.UnaryOp(op=op, operand=operand):
            value = _value(operand, columns)
            return np.logical_not(value) if isinstance(op, ast.Not) else -value if isinstance(op, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right):
            return _NUMBERS[type(op)](_value(left, columns), _value(right, columns))
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [_value(part, columns) for part in (left, *others)]
            found = [_COMPARISONS[type(op)](a, b) for a, op, b in zip(values, ops, values[1:], strict=False)]
            return reduce(np.logical_and, found)
        case ast.Name(id=name):
            return columns[_KEYWORDS.get(name, name)].astype(np.float64)
        case ast.Constant(value=int() | float() as value):
            return np.float64(value)
    raise AssertionError(ast.dump(node))
