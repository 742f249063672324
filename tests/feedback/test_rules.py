"""Feedback rules: the grammar, the first match, nulls, and what is refused."""

from __future__ import annotations

import pyarrow as pa
import pytest

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


def matching(condition: str) -> list[int]:
    """The rows that a condition matches."""
    feedback = apply_rules(RAW, (FeedbackRule(feedback="negative", when=condition),))
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
    ],
)
def test_anything_outside_the_grammar_is_refused(condition):
    with pytest.raises(DataError, match="rule `"):
        matching(condition)


def test_unknown_column_lists_what_is_there():
    with pytest.raises(DataError, match=r"stars.*lacks.*rating, reason, hidden"):
        matching("stars <= 2")


@pytest.mark.parametrize("condition", ["rating <= 'two'", "reason in [1, 2]", "reason > 3", "rating"])
def test_values_of_another_type_are_refused(condition):
    with pytest.raises(DataError, match=r"rule `.*(of its own type|== 1)"):
        matching(condition)
