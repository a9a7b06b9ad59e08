"""Arithmetic and conditions over configuration keys, for space files. Nothing of Python is ever executed."""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]
LONGEST = 200  # characters; bounds the nesting too
WHOLE = 1e-9  # how far from a whole number a result may be to count as one

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_SAME: dict[type, Callable[[Any, Any], bool]] = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
_ORDER: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max}
_CONSTANTS = {"null": None, "true": True, "false": False}
_ALLOWED = "numbers, strings, true, false, null, keys, + - * / // %, comparisons, and, or, not, min, max"


class ExpressionError(ValueError):
    """An expression that cannot be read, or a value that it cannot have; one line without the parameter's name."""


@dataclass(frozen=True)
class Expression:
    """``200 / process.num_terms``: numbers, strings, true, false, null, dotted keys, + - * / // %, comparisons,
    and, or, not, min, max, with Python's precedence. ``text`` is the normal form."""

    text: str

    @staticmethod
    def read(source: str | float) -> Expression:
        """Of a text or a number.

        Raises:
            ExpressionError: for bad syntax, or anything that is not on the list.
        """
        text = str(source).strip()
        if len(text) > LONGEST:
            raise ExpressionError(f"an expression has at most {LONGEST} characters, got {len(text)}")
        try:
            normal = ast.unparse(ast.parse(text, mode="eval"))
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            cut = "; inside { } YAML ends a text at a comma: quote it" if text.count("(") > text.count(")") else ""
            raise ExpressionError(
                f"cannot read the expression {text!r}: {getattr(error, 'msg', error)}{cut}"
            ) from error
        _compiled(normal)
        return Expression(normal)

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted keys that it refers to, in order."""
        return _compiled(self.text)[1]

    @property
    def plain(self) -> Any:
        """A number where it is only that, else its text: as a space file has it."""
        value = None if self.names else self.value({})
        return value if _is_number(value) else self.text

    def value(self, values: Values) -> Any:
        """What it is for these values of its names; a result within 1e-9 of a whole number is that int.

        Raises:
            ExpressionError: for operands of a wrong kind, a division by zero, a result that is not finite.
        """
        try:
            result = _compiled(self.text)[0](values)
        except (ZeroDivisionError, OverflowError) as error:
            reason = "divides by zero" if isinstance(error, ZeroDivisionError) else "overflows"
            raise ExpressionError(f"{self.text} {reason}") from error
        return _whole(result) if _is_number(result) else result

    def number(self, values: Values) -> int | float:
        """``value``, which must be a number.

        Raises:
            ExpressionError: as ``value``, and for another kind.
        """
        return _number(self.value(values), self.text)

    def truth(self, values: Values) -> bool:
        """``value``, which must be true or false.

        Raises:
            ExpressionError: as ``value``, and for another kind.
        """
        return _truth(self.value(values), self.text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(number: float) -> int | float:
    if not math.isfinite(number):
        raise ExpressionError(f"a value must be finite, got {number}")
    return round(number) if abs(number - round(number)) <= WHOLE else number


def _number(value: Any, text: str) -> Any:
    if not _is_number(value):
        raise ExpressionError(f"{text} must be a number, got {value!r}")
    return value


def _truth(value: Any, text: str) -> bool:
    if not isinstance(value, bool):
        raise ExpressionError(f"{text} must be true or false, got {value!r}")
    return value


@functools.lru_cache(maxsize=1024)
def _compiled(text: str) -> tuple[Callable[[Values], Any], tuple[str, ...]]:
    names: list[str] = []
    function = _translate(ast.parse(text, mode="eval").body, names)
    return function, tuple(dict.fromkeys(names))


def _translate(node: ast.expr, names: list[str]) -> Callable[[Values], Any]:
    """A function of the names' values; whatever is not listed here is refused."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as constant):
            return lambda values: constant
        case ast.Name() | ast.Attribute() if (name := _dotted(node)) is not None:
            if name in _CONSTANTS:
                return lambda values: _CONSTANTS[name]
            names.append(name)
            return lambda values: values.get(name)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            inner, factor = _translate(operand, names), -1 if isinstance(sign, ast.USub) else 1
            return lambda values: factor * _number(inner(values), ast.unparse(operand))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _translate(operand, names)
            return lambda values: not _truth(inner(values), ast.unparse(operand))
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            return _operation(_ARITHMETIC[type(op)], [node.left, node.right], names)
        case ast.BoolOp(op=op):
            parts = [(_translate(part, names), ast.unparse(part)) for part in node.values]
            join = all if isinstance(op, ast.And) else any
            return lambda values: join(_truth(part(values), words) for part, words in parts)
        case ast.Compare() if all(type(op) in _SAME | _ORDER for op in node.ops):
            sides = [node.left, *node.comparators]
            steps = [_comparison(*step, names) for step in zip(node.ops, sides, sides[1:], strict=False)]
            return lambda values: all(step(values) for step in steps)
        case ast.Call(func=ast.Name(id=called), args=[_, _, *_] as inputs, keywords=[]) if called in _FUNCTIONS:
            return _operation(_FUNCTIONS[called], inputs, names)
    raise ExpressionError(f"an expression may hold {_ALLOWED}; not {ast.unparse(node)}")


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := _dotted(node.value)) is not None:
        return f"{front}.{node.attr}"
    return None


def _operation(function: Callable[..., Any], nodes: list[ast.expr], names: list[str]) -> Callable[[Values], Any]:
    inputs = [(_translate(node, names), ast.unparse(node)) for node in nodes]
    return lambda values: function(*(_number(value(values), text) for value, text in inputs))


def _comparison(op: ast.cmpop, left: ast.expr, right: ast.expr, names: list[str]) -> Callable[[Values], bool]:
    if type(op) in _ORDER:
        return _operation(_ORDER[type(op)], [left, right], names)
    first, second = _translate(left, names), _translate(right, names)
    return lambda values: _SAME[type(op)](first(values), second(values))
