"""Feedback rules: the grammar, the first match, nulls, and what is refused."""

from __future__ import annotations

import operator
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from conrec.config import FeedbackRule
from conrec.errors import DataError
from conrec.feedback.rules import apply_rules

RAW = pa.table(
    {
        "rating": pa.array([1.0, 2.0, 3.0, 4.0, None]),
        "reason": ["spam", "bought", "dull", None, "dull"],
        "hidden": pa.array([True, False, False, None, True]),
        "play_ms": pa.array([0, 10, 20, 30, 40], pa.int64()),
        "length_ms": pa.array([5, 10, 30, 20, 40], pa.int32()),
    }
)


def matching(condition: str, table: pa.Table = RAW) -> list[int]:
    """The rows that a condition matches."""
    feedback = apply_rules(table, (FeedbackRule(feedback="negative", when=condition),))
    return [row for row, kind in enumerate(feedback.to_pylist()) if kind == "negative"]


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("rating <= 2", [0, 1]),
        ("2 < rating", [2, 3]),
        ("rating == 3 or rating != 3", [0, 1, 2, 3]),
        ("not rating <= 2", [2, 3, 4]),
        ("0 < play_ms < 30", [1, 2]),
        ("play_ms >= length_ms", [1, 3, 4]),
        ("play_ms > -1", [0, 1, 2, 3, 4]),
        ("hidden", [0, 4]),
        ("not hidden and rating >= 2", [1, 2, 3]),
        ("reason in ['dull', 'spam']", [0, 2, 4]),
        ("reason not in ('dull', 'spam')", [1]),
        ("reason == 'dull' and (rating > 4 or play_ms == 40)", [4]),
        ("rating in [1, 4]", [0, 3]),
    ],
)
def test_conditions_match_the_rows_they_say(condition, rows):
    assert matching(condition) == rows


def test_dictionary_columns_compare_like_strings():
    table = pa.table({"reason": pa.array(["dull", "spam"]).dictionary_encode()})
    feedback = apply_rules(table, (FeedbackRule(feedback="negative", when="reason == 'spam'"),))
    assert feedback.to_pylist() == ["neutral", "negative"]


def test_first_rule_that_matches_decides_and_the_rest_is_neutral():
    rules = (
        FeedbackRule(feedback="exclude", when="reason == 'bought'"),
        FeedbackRule(feedback="negative", when="rating <= 2"),
        FeedbackRule(feedback="positive", when="rating <= 3"),
    )
    assert apply_rules(RAW, rules).to_pylist() == ["negative", "exclude", "positive", "neutral", "neutral"]


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os').system('true')",
        "rating.__class__ == 1",
        "rating + 1 <= 3",
        "(lambda: rating)() == 1",
        "rating[0] == 1",
        "[x for x in reason] == 1",
        "rating if hidden else play_ms",
        "rating is None",
        "f'{rating}' == '1'",
        "rating == None",
        "rating in reason",
        "rating <=",
        "rating = 2",
        "",
        "1 < 2",
        "5",
        "2 in [rating]",
        "rating in [play_ms]",
        "not 1 < 2",
        "-reason == 1",
        "rating\0",
    ],
)
def test_anything_outside_the_grammar_is_refused_before_there_is_a_table(condition):
    with pytest.raises(ValidationError, match=r"rule `.*; write comparisons"):
        FeedbackRule(feedback="negative", when=condition)


def test_unknown_column_lists_what_is_there():
    with pytest.raises(DataError, match=r"stars.*lacks.*rating, reason, hidden"):
        matching("stars <= 2")


@pytest.mark.parametrize("condition", ["rating <= 'two'", "reason in [1, 2]", "reason > 3", "rating"])
def test_values_of_another_type_are_refused(condition):
    with pytest.raises(DataError, match=r"rule `.*(of its own type|== 1)"):
        matching(condition)


OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
WHOLE = [0, 1, 2, 3, 100, 127]
TENTHS = [0.0, 0.1, 0.2, 0.3, 1.0, 2.5, 3.0, 100.0]
NUMBERS = {
    "int8": pa.array([*WHOLE, -1, -128, None], pa.int8()),
    "int64": pa.array([*WHOLE, -1, 2**63 - 1, -(2**63), 2**53 + 1], pa.int64()),
    "uint8": pa.array([*WHOLE, 255, None], pa.uint8()),
    "uint64": pa.array([*WHOLE, 2**64 - 1, None], pa.uint64()),
    "float16": pa.array([*map(np.float16, [*TENTHS, -1, np.inf, -np.inf]), None], pa.float16()),
    "float32": pa.array([*TENTHS, -1, np.inf, -np.inf, 3e38, None], pa.float32()),
    "float64": pa.array([*TENTHS, -1, np.inf, -np.inf, 1e300, None], pa.float64()),
    "decimal32": pa.array(
        [*map(Decimal, ["0.00", "0.10", "0.30", "2.50", "-1.00", "9999999.99"]), None], pa.decimal32(9, 2)
    ),
    "decimal128": pa.array(
        [*map(Decimal, ["0", "0.1", "0.3", "2.5", "-1", "3", "99999999.99"]), None], pa.decimal128(10, 2)
    ),
    "decimal256": pa.array([Decimal("0.1"), Decimal("2.5"), Decimal(10) ** 60], pa.decimal256(70, 5)),
}
LITERALS = (
    "0 -1 2 2.5 -0.5 0.1 0.3 0.30000001 127 128 -129 255 256 300 -1e3 1e-9 1e39 -1e39 1e999 -1e999 9223372036854775807"
)
LITERALS += " 9223372036854775808 18446744073709551616 9007199254740993 65504 65520 99999999.995 1" + "0" * 400


def exactly(value):
    return value if np.isinf(value) else Fraction(value)


def meant(text, name):
    """The literal as the column's type has it, where it can."""
    number = float(text)
    if not name.startswith("float"):
        return number if "e999" in text else Fraction(text)
    with np.errstate(over="ignore"):
        nearest = float(np.dtype(name).type(number))
    return exactly(number if np.isinf(nearest) else nearest)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_literal_takes_the_columns_type_and_the_rest_is_mathematics(name):
    values = [float(value) if isinstance(value, np.floating) else value for value in NUMBERS[name].to_pylist()]
    wanted = {
        row: exactly(value) if isinstance(value, float) else Fraction(value)
        for row, value in enumerate(values)
        if value is not None
    }
    table = pa.table({"x": NUMBERS[name]})
    for text in LITERALS.split():
        literal = meant(text, name)
        for sign, holds in OPERATORS.items():
            rows = [row for row, value in wanted.items() if holds(value, literal)]
            for condition in (f"x {sign} {text}", f"{text} {FLIPPED[sign]} x"):
                assert matching(condition, table) == rows, condition
        equal = [row for row, value in wanted.items() if value == literal]
        assert matching(f"x in [{text}]", table) == equal
        assert matching(f"x in [7, {text}]", table) == equal
        assert matching(f"x not in [{text}]", table) == sorted(wanted.keys() - set(equal))


@pytest.mark.parametrize("left", NUMBERS)
@pytest.mark.parametrize("right", NUMBERS)
def test_columns_of_different_types_compare_by_their_values(left, right):
    values = [value for value in (0, 1, 2, 3) for _ in range(4)], [0, 1, 2, 3] * 4
    kinds = NUMBERS[left].type, NUMBERS[right].type
    x, y = (pa.array(side).cast(pa.int8()).cast(kind) for side, kind in zip(values, kinds, strict=True))
    table = pa.table({"x": x, "y": y})
    for sign, holds in OPERATORS.items():
        rows = [row for row, pair in enumerate(zip(*values, strict=True)) if holds(*pair)]
        assert matching(f"x {sign} y", table) == rows


@pytest.mark.parametrize(
    ("left", "right", "rows"),
    [
        (pa.array([2**64 - 1, 5], pa.uint64()), pa.array([-1, 5], pa.int64()), [1]),
        (pa.array([Decimal("0.1"), Decimal("0.2")], pa.decimal128(5, 2)), pa.array([0.1, 0.3], pa.float32()), [0]),
        (pa.array([Decimal("0.1"), Decimal("0.2")], pa.decimal128(5, 2)), pa.array([0.1, 0.3]), [0]),
        (pa.array([Decimal("3.00"), Decimal("3.01")], pa.decimal128(38, 2)), pa.array([3, 3], pa.uint64()), [0]),
        (pa.array(["a", "b"]).cast(pa.string_view()), pa.array(["a", "c"], pa.large_string()), [0]),
        (pa.array(["a", "b"]).dictionary_encode(), pa.array(["a", "c"]), [0]),
        (pa.array([1, 2]), pa.array([1.0, 2.5]), [0]),
    ],
)
def test_equal_values_of_different_types_are_equal(left, right, rows):
    assert matching("x == y", pa.table({"x": left, "y": right})) == rows
    assert matching("y == x", pa.table({"x": left, "y": right})) == rows


def test_integers_that_no_float_holds_are_refused_beside_floats():
    with pytest.raises(DataError, match=r"`x == y`|`x` with `y`.*9007199254740993"):
        matching("x == y", pa.table({"x": [2**53 + 1], "y": [float(2**53)]}))


def test_text_views_and_times_are_values_like_others():
    view = pa.array(["dull", "spam", None]).cast(pa.string_view())
    times = pa.array(["2022-05-01", "2022-05-02", None]).cast(pa.timestamp("us")).cast(pa.timestamp("us", "UTC"))
    table = pa.table({"reason": view, "at": times, "nothing": pa.nulls(3)})
    assert matching("reason == 'spam'", table) == [1]
    assert matching("reason in ['spam', 'x']", table) == [1]
    assert matching("reason not in ['spam']", table) == [0]
    assert matching("at >= '2022-05-02T00:00:00Z'", table) == [1]
    assert matching("nothing == 1 or nothing in ['x'] or nothing != 2", table) == []


@pytest.mark.parametrize("condition", ["x == True", "x in [True]", "x == 'a'", "flag == 1", "flag in [0]", "x == text"])
def test_numbers_text_and_truth_are_not_mixed(condition):
    with pytest.raises(DataError, match="of its own type"):
        matching(condition, pa.table({"x": [1], "flag": [True], "text": ["1"]}))
