"""Feedback rules on tables of raw columns; `conrec/conditions.py` has the grammar of their conditions.

    feedback = apply_rules(table, (FeedbackRule(feedback="negative", when="rating <= 2"),))

A literal takes its column's type in every comparison (`comparisons.py`). A comparison with a null is false; its
negation by `not` is therefore true.
"""

from __future__ import annotations

import ast

import pyarrow as pa
import pyarrow.compute as pc

from conrec.conditions import OPERATORS, columns, constant, parsed
from conrec.config import FeedbackRule
from conrec.errors import DataError
from conrec.feedback.comparisons import FLIPPED, compare, compare_columns, is_in
from conrec.tables import plain_column


def apply_rules(table: pa.Table, rules: tuple[FeedbackRule, ...], source: str = "interactions") -> pa.Array:
    """The feedback of each row: that of the first rule that matches, else `neutral`.

    Shape: (N,) string in {positive, negative, neutral, exclude}. Raises `DataError` naming the rule, for a column
    that the table lacks, or values that cannot be compared.
    """
    matches = [_Condition(table, rule.when, source).mask() for rule in rules]
    if not rules:
        return pa.repeat(pa.scalar("neutral"), len(table))
    names = [pa.scalar(rule.feedback) for rule in rules]
    chosen = pc.case_when(
        pc.make_struct(*matches, field_names=[str(place) for place in range(len(rules))]),
        *names,
        pa.scalar("neutral"),
    )
    return chosen.combine_chunks() if isinstance(chosen, pa.ChunkedArray) else chosen


def rule_columns(rules: tuple[FeedbackRule, ...]) -> set[str]:
    """Columns that the conditions name."""
    return {name for rule in rules for name in columns(parsed(rule.when))}


class _Condition:
    """One rule's condition, turned into Arrow operations on one table."""

    def __init__(self, table: pa.Table, text: str, source: str) -> None:
        self.table, self.text, self.source = table, text, source

    def mask(self) -> pa.ChunkedArray:
        """Where the condition holds, shape (N,) Boolean without nulls."""
        return self._truth(parsed(self.text))

    def _refused(self, why: str, remedy: str) -> DataError:
        return DataError(f"{self.source}: rule `{self.text}` {why}; {remedy}")

    def _truth(self, node: ast.expr) -> pa.ChunkedArray:
        if isinstance(node, ast.BoolOp):
            combine = pc.and_ if isinstance(node.op, ast.And) else pc.or_
            result = self._truth(node.values[0])
            for value in node.values[1:]:
                result = combine(result, self._truth(value))
            return result
        if isinstance(node, ast.UnaryOp):
            return pc.invert(self._truth(node.operand))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [self._compare(*part) for part in zip(sides[:-1], node.ops, sides[1:], strict=True)]
            result = parts[0]
            for part in parts[1:]:
                result = pc.and_(result, part)
            return result
        column = self._column(node)
        if not pa.types.is_boolean(column.type):
            name = ast.unparse(node)
            raise self._refused(
                f"takes column {name}, which is {column.type}, for true or false", f"write `{name} == 1`"
            )
        return pc.fill_null(column, False)

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> pa.ChunkedArray:
        try:
            if isinstance(right, ast.List | ast.Tuple):
                column = self._column(left)
                listed = is_in(column, [constant(element) for element in right.elts])
                return listed if isinstance(operator, ast.In) else pc.and_(pc.invert(listed), pc.is_valid(column))
            return pc.fill_null(self._compared(left, operator, right), False)
        except (pa.ArrowException, TypeError) as error:
            raise self._refused(
                f"compares `{ast.unparse(left)}` with `{ast.unparse(right)}`, which does not work ({error})",
                "compare a column with values of its own type",
            ) from None

    def _compared(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> pa.ChunkedArray:
        sign = OPERATORS[type(operator)]
        if not isinstance(left, ast.Name):
            return compare(self._column(right), FLIPPED[sign], constant(left))
        if not isinstance(right, ast.Name):
            return compare(self._column(left), sign, constant(right))
        return compare_columns(self._column(left), sign, self._column(right))

    def _column(self, node: ast.expr) -> pa.ChunkedArray:
        name = ast.unparse(node)
        if name not in self.table.column_names:
            raise self._refused(
                f"names column {name}, which the file lacks", f"its columns are {', '.join(self.table.column_names)}"
            )
        return plain_column(self.table.column(name))
