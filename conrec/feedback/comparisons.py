"""A column beside a literal, a list of literals or another column, right as mathematics.

    mask = compare(table["rating"], "<=", 2.5)      # shape (N,) Boolean, null or false where the column is null

A literal takes the column's type: `0.1` beside float32 is the float32 nearest to a tenth, which the file holds.
Integers and decimals cannot take every literal (2.5, 300 for uint8): beside those the answer is what it would be if
they could. What has no answer, or none that is exact (integers above 2^53 beside a column of floats), is a `TypeError`
or an `ArrowException`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.conditions import Constant, Operator

FLIPPED: dict[Operator, Operator] = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
"""`a < b` is `b > a`."""
_FUNCTIONS: dict[Operator, Callable[..., pa.ChunkedArray]] = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}
_WIDEST_DECIMAL = 76


def compare(column: pa.ChunkedArray, operator: Operator, value: Constant) -> pa.ChunkedArray:
    """The column beside a literal."""
    if _is_exact(column.type):
        return _compare_exact(column, operator, value)
    if pa.types.is_floating(column.type):
        return _compare_floating(column, operator, value)
    if pa.types.is_null(column.type):
        return pc.is_valid(column)
    return _FUNCTIONS[operator](column, _scalar(value, column.type))


def is_in(column: pa.ChunkedArray, values: Sequence[Constant]) -> pa.ChunkedArray:
    """Where the column equals one of the literals."""
    if not (_is_exact(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        known = pa.array([_scalar(value, column.type).as_py() for value in values], column.type)
        return pc.is_in(column, value_set=known, skip_nulls=True)
    matches = pc.and_(pc.is_valid(column), False)
    for value in values:
        matches = pc.or_(matches, pc.fill_null(compare(column, "==", value), False))
    return matches


def compare_columns(left: pa.ChunkedArray, operator: Operator, right: pa.ChunkedArray) -> pa.ChunkedArray:
    """One column beside another, row by row."""
    common = _common_type(left.type, right.type)
    return _FUNCTIONS[operator](_as_type(left, common), _as_type(right, common))


def _as_type(column: pa.ChunkedArray, kind: pa.DataType | None) -> pa.ChunkedArray:
    if kind is None:
        return column
    if pa.types.is_decimal(column.type) and pa.types.is_floating(kind):
        column = column.cast(pa.string())  # Arrow's cast of decimals to floats is off by a last bit
    return column.cast(kind)


def _is_exact(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_decimal(kind)


def _number(value: Constant, kind: pa.DataType) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number, the column is {kind}")
    return value


def _compare_exact(column: pa.ChunkedArray, operator: Operator, value: Constant) -> pa.ChunkedArray:
    """In units of the last place: below the literal lies `floor`, and between the two no value of the type."""
    number = _number(value, column.type)
    scale, low, high = _range(column.type)
    if isinstance(number, float) and math.isinf(number):
        units: Fraction | float = number
    else:
        units = Fraction(repr(number)) * Fraction(10) ** scale
    if units < low or units > high:
        sides: tuple[Operator, ...] = (">", ">=") if units < low else ("<", "<=")
        return pc.and_(pc.is_valid(column), operator in (*sides, "!="))
    floor = math.floor(units)
    if floor != units:
        if operator in ("==", "!="):
            return pc.and_(pc.is_valid(column), operator == "!=")
        operator = "<=" if operator in ("<", "<=") else ">"
    nearest = Decimal(f"{floor}e{-scale}") if pa.types.is_decimal(column.type) else floor
    return _FUNCTIONS[operator](column, pa.scalar(nearest, column.type))


def _range(kind: pa.DataType) -> tuple[int, int, int]:
    """Decimal places, and the least and the greatest value in units of the last one."""
    if pa.types.is_decimal(kind):
        return kind.scale, 1 - 10**kind.precision, 10**kind.precision - 1
    if pa.types.is_unsigned_integer(kind):
        return 0, 0, 2**kind.bit_width - 1
    return 0, -(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1


def _compare_floating(column: pa.ChunkedArray, operator: Operator, value: Constant) -> pa.ChunkedArray:
    number = _number(value, column.type)
    if abs(number) > sys.float_info.max:
        number = math.inf if number > 0 else -math.inf
    with np.errstate(over="ignore"):
        taken: float = np.array(number).astype(column.type.to_pandas_dtype()).item()
    if taken != number and math.isinf(taken):  # beyond the type, below infinity
        return _FUNCTIONS[operator](column.cast(pa.float64()), pa.scalar(float(number)))
    # Arrow compares no float16; every one of them is a float32.
    kind = pa.float32() if pa.types.is_float16(column.type) else column.type
    return _FUNCTIONS[operator](column.cast(kind), pa.scalar(taken, kind))


def _scalar(value: Constant, kind: pa.DataType) -> pa.Scalar:
    if pa.types.is_boolean(kind) != isinstance(value, bool) or not isinstance(value, bool | str):
        raise TypeError(f"{value!r} is no value of {kind}")
    return pa.scalar(value).cast(kind)


def _common_type(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """A type that holds the values of both; None: Arrow finds one itself, or there is none."""
    if left == right and not pa.types.is_float16(left):
        return None
    both = (left, right)
    floating = [kind for kind in both if pa.types.is_floating(kind)]
    if floating and any(map(pa.types.is_decimal, both)):
        return floating[0] if not pa.types.is_float16(floating[0]) else pa.float32()
    if floating and all(pa.types.is_floating(kind) or pa.types.is_integer(kind) for kind in both):
        return pa.float64()
    signed = any(map(pa.types.is_signed_integer, both)) and pa.uint64() in both
    if signed or (all(map(_is_exact, both)) and any(map(pa.types.is_decimal, both))):
        return pa.decimal256(_WIDEST_DECIMAL, max(_range(kind)[0] for kind in both))
    return None
