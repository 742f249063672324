"""Feedback rules: conditions over raw columns, in a small part of Python's expression grammar.

    feedback = apply_rules(table, (FeedbackRule(feedback="negative", when="rating <= 2"),))

A condition is comparisons of columns with numbers, strings or other columns, `in [...]`, `not in [...]`,
`and`, `or`, `not` and Boolean columns. It is parsed, never evaluated by Python: calls, attributes and
arithmetic do not exist here. A comparison with a null is false; its negation by `not` is therefore true.
"""

from __future__ import annotations

import ast

import pyarrow as pa
import pyarrow.compute as pc

from conrec.config import FeedbackRule
from conrec.errors import DataError

_COMPARISONS = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
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


class _Condition:
    """One rule's condition, turned into Arrow operations on one table."""

    def __init__(self, table: pa.Table, text: str, source: str) -> None:
        self.table, self.text, self.source = table, text, source

    def mask(self) -> pa.ChunkedArray:
        """Where the condition holds, shape (N,) Boolean without nulls."""
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
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
            column = self._column(node.id)
            if not pa.types.is_boolean(column.type):
                raise self._refused(
                    f"takes column {node.id}, which is {column.type}, for true or false", f"write `{node.id} == 1`"
                )
            return pc.fill_null(column, False)
        raise self._refused(f"holds `{ast.unparse(node)}`, which is not a condition")

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> pa.ChunkedArray:
        try:
            if isinstance(operator, ast.In | ast.NotIn):
                column, values = self._operand(left), self._list(right)
                # The list takes the column's type, so that a value of another type is refused, not unequal.
                found = pc.is_in(column, value_set=pa.array(values, type=column.type), skip_nulls=True)
                if isinstance(operator, ast.NotIn):
                    found = pc.and_(pc.invert(found), pc.is_valid(column))
                return found
            if type(operator) not in _COMPARISONS:
                raise self._refused(f"compares by `{type(operator).__name__}`")
            result = _COMPARISONS[type(operator)](self._operand(left), self._operand(right))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise self._refused(
                f"compares `{ast.unparse(left)}` with `{ast.unparse(right)}`, which does not work ({error})",
                "compare a column with values of its own type",
            ) from None
        if isinstance(result, pa.Scalar):
            raise self._refused(f"compares `{ast.unparse(left)}` with `{ast.unparse(right)}`, without a column")
        return pc.fill_null(result, False)

    def _operand(self, node: ast.expr) -> pa.ChunkedArray | pa.Scalar:
        return self._column(node.id) if isinstance(node, ast.Name) else pa.scalar(self._constant(node))

    def _list(self, node: ast.expr) -> list[object]:
        if not isinstance(node, ast.List | ast.Tuple):
            raise self._refused(f"has `{ast.unparse(node)}` behind `in`", 'write a list, for example `in ["a", "b"]`')
        return [self._constant(element) for element in node.elts]

    def _constant(self, node: ast.expr) -> object:
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._constant(node.operand)
            if isinstance(value, int | float):
                return -value
        raise self._refused(f"holds `{ast.unparse(node)}`, which is neither a column nor a number nor a string")

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            raise self._refused(
                f"names column {name}, which the file lacks",
                f"its columns are {', '.join(self.table.column_names)}",
            )
        column = self.table.column(name)
        return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
