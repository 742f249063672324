"""Feedback rules: conditions over raw columns, in a small part of Python's expression grammar.

    feedback = apply_rules(table, (FeedbackRule(feedback="negative", when="rating <= 2"),))

A condition is comparisons of columns with numbers, strings or other columns, `in [...]`, `not in [...]`,
`and`, `or`, `not` and Boolean columns. It is parsed, never evaluated by Python: calls, attributes and
arithmetic do not exist here. A literal takes its column's type in every comparison (`comparisons.py`). A comparison
with a null is false; its negation by `not` is therefore true.
"""

from __future__ import annotations

import ast
import contextlib

import pyarrow as pa
import pyarrow.compute as pc

from conrec.config import FeedbackRule
from conrec.errors import DataError
from conrec.feedback.comparisons import FLIPPED, Literal, Operator, compare, compare_columns, is_in
from conrec.tables import plain_column

_OPERATORS: dict[type[ast.cmpop], Operator] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_GRAMMAR = "write comparisons, `in [...]`, `and`, `or` and `not` over column names, for example `rating <= 2`"


def apply_rules(table: pa.Table, rules: tuple[FeedbackRule, ...], source: str = "interactions") -> pa.Array:
    """The feedback of each row: that of the first rule that matches, else `neutral`.

    Shape: (N,) string in {positive, negative, neutral, exclude}. Raises `DataError` naming the rule, for a column
    that the table lacks, a condition outside the grammar, or values that cannot be compared.
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
    """Columns that the conditions name; of one that is no expression none, which `apply_rules` refuses."""
    names = set()
    for rule in rules:
        with contextlib.suppress(SyntaxError, ValueError):
            names |= {node.id for node in ast.walk(_parsed(rule.when)) if isinstance(node, ast.Name)}
    return names


def _parsed(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


class _Condition:
    """One rule's condition, turned into Arrow operations on one table."""

    def __init__(self, table: pa.Table, text: str, source: str) -> None:
        self.table, self.text, self.source = table, text, source

    def mask(self) -> pa.ChunkedArray:
        """Where the condition holds, shape (N,) Boolean without nulls."""
        try:
            tree = _parsed(self.text)
        except (SyntaxError, ValueError) as error:
            raise self._refused(f"is not an expression ({error})") from None
        return self._truth(tree)

    def _refused(self, why: str, remedy: str = _GRAMMAR) -> DataError:
        return DataError(f"{self.source}: rule `{self.text}` {why}; {remedy}")

    def _truth(self, node: ast.expr) -> pa.ChunkedArray:
        if isinstance(node, ast.BoolOp):
            combine = pc.and_ if isinstance(node.op, ast.And) else pc.or_
            result = self._truth(node.values[0])
            for value in node.values[1:]:
                result = combine(result, self._truth(value))
            return result
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return pc.invert(self._truth(node.operand))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [self._compare(*part) for part in zip(sides[:-1], node.ops, sides[1:], strict=True)]
            result = parts[0]
            for part in parts[1:]:
                result = pc.and_(result, part)
            return result
        if isinstance(node, ast.Name):
            column = self._column(node)
            if not pa.types.is_boolean(column.type):
                raise self._refused(
                    f"takes column {node.id}, which is {column.type}, for true or false", f"write `{node.id} == 1`"
                )
            return pc.fill_null(column, False)
        raise self._refused(f"holds `{ast.unparse(node)}`, which is not a condition")

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> pa.ChunkedArray:
        try:
            if isinstance(operator, ast.In | ast.NotIn):
                column = self._column(left)
                listed = is_in(column, self._list(right))
                return listed if isinstance(operator, ast.In) else pc.and_(pc.invert(listed), pc.is_valid(column))
            if type(operator) not in _OPERATORS:
                raise self._refused(f"compares by `{type(operator).__name__}`")
            return pc.fill_null(self._compared(left, _OPERATORS[type(operator)], right), False)
        except (pa.ArrowException, TypeError) as error:
            raise self._refused(
                f"compares `{ast.unparse(left)}` with `{ast.unparse(right)}`, which does not work ({error})",
                "compare a column with values of its own type",
            ) from None

    def _compared(self, left: ast.expr, operator: Operator, right: ast.expr) -> pa.ChunkedArray:
        if isinstance(left, ast.Name) and isinstance(right, ast.Name):
            return compare_columns(self._column(left), operator, self._column(right))
        if isinstance(left, ast.Name):
            return compare(self._column(left), operator, self._constant(right))
        value = self._constant(left)
        if not isinstance(right, ast.Name):
            raise self._refused(f"compares `{ast.unparse(left)}` with `{ast.unparse(right)}`, without a column")
        return compare(self._column(right), FLIPPED[operator], value)

    def _list(self, node: ast.expr) -> list[Literal]:
        if not isinstance(node, ast.List | ast.Tuple):
            raise self._refused(f"has `{ast.unparse(node)}` behind `in`", 'write a list, for example `in ["a", "b"]`')
        return [self._constant(element) for element in node.elts]

    def _constant(self, node: ast.expr) -> Literal:
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._constant(node.operand)
            if isinstance(value, int | float):
                return -value
        raise self._refused(f"holds `{ast.unparse(node)}`, which is neither a column nor a number nor a string")

    def _column(self, node: ast.expr) -> pa.ChunkedArray:
        if not isinstance(node, ast.Name):
            raise self._refused(f"holds `{ast.unparse(node)}` where a column must stand")
        if node.id not in self.table.column_names:
            raise self._refused(
                f"names column {node.id}, which the file lacks",
                f"its columns are {', '.join(self.table.column_names)}",
            )
        return plain_column(self.table.column(node.id))
