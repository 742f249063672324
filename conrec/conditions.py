"""The grammar of a feedback rule's condition: a small part of Python's expressions.

    tree = parsed("rating <= 2 and reason not in ['bought']")

A condition is comparisons of columns with numbers, strings or other columns, `in [...]`, `not in [...]`,
`and`, `or`, `not` and Boolean columns. It is parsed, never evaluated by Python: calls, attributes and
arithmetic do not exist here. Which columns a table has, and of what type, `feedback/rules` looks at.
"""

from __future__ import annotations

import ast
from typing import Literal

Operator = Literal["<", "<=", ">", ">=", "==", "!="]
Constant = bool | int | float | str
OPERATORS: dict[type[ast.cmpop], Operator] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_GRAMMAR = "write comparisons, `in [...]`, `and`, `or` and `not` over column names, for example `rating <= 2`"


def parsed(text: str) -> ast.expr:
    """The tree of a condition; every node of it is one of those that the module names.

    Raises `ValueError` naming the condition, what is outside the grammar, and the grammar.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _check_truth(tree)
    except SyntaxError as error:
        raise ValueError(f"rule `{text}` is not an expression ({error.msg}); {_GRAMMAR}") from None
    except ValueError as error:
        raise ValueError(f"rule `{text}` {error}; {_GRAMMAR}") from None
    return tree


def columns(tree: ast.expr) -> set[str]:
    """The columns that a condition names."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def constant(node: ast.expr) -> Constant:
    """The number, string or truth value that a node is. Raises `ValueError` for any other node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = constant(node.operand)
        if isinstance(value, int | float):
            return -value
    raise ValueError(f"holds `{ast.unparse(node)}`, which is neither a column nor a number nor a string")


def _check_truth(node: ast.expr) -> None:
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check_truth(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_truth(node.operand)
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        for left, operator, right in zip(sides[:-1], node.ops, sides[1:], strict=True):
            _check_compared(left, operator, right)
    elif not isinstance(node, ast.Name):
        raise ValueError(f"holds `{ast.unparse(node)}`, which is not a condition")


def _check_compared(left: ast.expr, operator: ast.cmpop, right: ast.expr) -> None:
    if isinstance(operator, ast.In | ast.NotIn):
        if not isinstance(left, ast.Name):
            raise ValueError(f"holds `{ast.unparse(left)}` where a column must stand")
        if not isinstance(right, ast.List | ast.Tuple):
            raise ValueError(f'has `{ast.unparse(right)}` behind `in`, not a list, for example `in ["a", "b"]`')
        literals = right.elts
    elif type(operator) not in OPERATORS:
        raise ValueError(f"compares by `{type(operator).__name__}`")
    else:
        literals = [side for side in (left, right) if not isinstance(side, ast.Name)]
    for literal in literals:
        constant(literal)
    if len(literals) == 2 and type(operator) in OPERATORS:
        raise ValueError(f"compares `{ast.unparse(left)}` with `{ast.unparse(right)}`, without a column")
