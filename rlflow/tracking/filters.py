"""Conditions on rollouts, such as ``reward/math_accuracy < 0.5 and finish_reason == 'length'``.

The text is parsed as a Python expression, and only what is listed here is evaluated: names of the rollout's numbers and
texts, constants, comparisons, ``and or not``, arithmetic, and a few functions. Nothing is ever run.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlflow.data.errors import DataError
from rlflow.tracking.rollouts import REWARD_PREFIX, RolloutRecord

COLUMN_PREFIX = "column/"
COUNT_PREFIX = "environment/"
"""Of what an episode's environment counts, as metrics are called."""
OWN_NAMES = (
    "step",
    "reward",
    "advantage",
    "num_tokens",
    "num_turns",
    "environment_reward",
    "finish_reason",
    "state",
    "error",
    "prompt",
    "completion",
    "prompt_id",
    "epoch",
    "sample_index",
    "policy_version",
)
"""What every rollout has; beside it there are the functions' rewards, and the columns of the data."""
MOST_CHARACTERS = 2000

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "len": len,
    "abs": abs,
    "lower": str.lower,
    "number": float,
    "matches": lambda text, pattern: re.search(pattern, text) is not None,
}
"""What may be called; of a value that is missing each is missing."""


class FilterError(DataError):
    """A condition that cannot be evaluated; the message says where, and what there is."""


def values_of(record: RolloutRecord) -> dict[str, Any]:
    """What a condition can name of a rollout; a value that is missing is None."""
    own = {name: _known(getattr(record, name)) for name in OWN_NAMES}
    rewards = {f"{REWARD_PREFIX}{name}": _known(value) for name, value in record.rewards.items()}
    columns = {f"{COLUMN_PREFIX}{name}": value for name, value in record.columns.items()}
    counts = {} if record.episode is None else record.episode.counts
    counted = {f"{COUNT_PREFIX}{name}": number for name, number in counts.items()}
    return {**record.columns, **own, **rewards, **columns, **counted}


def filter_records(records: Sequence[RolloutRecord], where: str) -> list[RolloutRecord]:
    """The rollouts for which a condition holds. A comparison with a value that is missing does not hold.

    Raises:
        FilterError: The condition cannot be read, or evaluated.
    """
    values = [values_of(record) for record in records]
    condition = Expression(where, _names(values))
    return [record for record, known in zip(records, values, strict=True) if condition(known)]


def filter_rows(rows: Sequence[Mapping[str, Any]], where: str) -> list[int]:
    """The rows of data, by their place, for which a condition holds. What `rlflow infer` writes has the names that a
    rollout has.

    Raises:
        FilterError: The condition cannot be read, or evaluated.
    """
    values = [_values_of_row(row) for row in rows]
    condition = Expression(where, list(dict.fromkeys(name for known in values for name in known)))
    return [index for index, known in enumerate(values) if condition(known)]


def judge_records(records: Sequence[RolloutRecord], condition: str) -> list[bool | None]:
    """Whether a condition holds of each rollout; None where something that it names is missing.

    Raises:
        FilterError: The condition cannot be read, or evaluated.
    """
    return _judge([values_of(record) for record in records], condition, OWN_NAMES)


def judge_rows(rows: Sequence[Mapping[str, Any]], condition: str) -> list[bool | None]:
    """As `judge_records`, of rows of data."""
    return _judge([_values_of_row(row) for row in rows], condition, ())


def _judge(values: Sequence[Mapping[str, Any]], condition: str, own: Sequence[str]) -> list[bool | None]:
    expression = Expression(condition, list(dict.fromkeys([*own, *(name for known in values for name in known)])))
    return [
        None if any(known.get(name) is None for name in expression.needs) else bool(expression(known))
        for known in values
    ]


def _values_of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a condition can name of a row."""
    nested = (("rewards", REWARD_PREFIX), ("columns", COLUMN_PREFIX))
    inner = {
        f"{prefix}{name}": _known(value)
        for column, prefix in nested
        if isinstance(row.get(column), Mapping)
        for name, value in row[column].items()
    }
    return {**{name: _known(value) for name, value in row.items()}, **inner}


def sort_records(records: Sequence[RolloutRecord], key: str, *, is_falling: bool = False) -> list[RolloutRecord]:
    """The rollouts by an expression, lowest first unless ``is_falling``; those for which it is missing last.

    Raises:
        FilterError: The expression cannot be read or evaluated, or its values have no order.
    """
    if not records:
        return []
    values = [values_of(record) for record in records]
    expression = Expression(key, _names(values))
    keyed = [(expression(known), record) for known, record in zip(values, records, strict=True)]
    having = [(value, record) for value, record in keyed if value is not None]
    try:
        having.sort(key=lambda one: one[0], reverse=is_falling)
    except TypeError as error:
        raise FilterError(f"--sort {key}: its values are of several kinds ({error})") from error
    return [record for _, record in having] + [record for value, record in keyed if value is None]


class Expression:
    """An expression over the names of a rollout."""

    def __init__(self, text: str, names: Sequence[str]) -> None:
        """
        Args:
            names: What it may name, those with slashes included.

        Raises:
            FilterError: It cannot be read, or names or does what is not known.
        """
        self.text = text
        if len(text) > MOST_CHARACTERS:
            raise FilterError(f"a condition of {len(text):,} characters: {MOST_CHARACTERS:,} are the most")
        self._names: dict[str, str] = {}
        try:
            self._tree = ast.parse(self._without_slashes(text.strip(), names), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"
            raise FilterError(
                f"{text!r} is no condition ({reason}); write e.g. reward < 0.5 and finish_reason == 'length'"
            ) from error
        try:
            for node in ast.walk(self._tree):
                self._check(node, names)
        except RecursionError as error:
            raise FilterError(f"{text!r} is nested too deeply") from error

    @property
    def needs(self) -> set[str]:
        """The names of values that are in it."""
        identifiers = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)} - _FUNCTIONS.keys()
        return {self._names.get(identifier, identifier) for identifier in identifiers}

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Its value for one rollout; None where what it needs is missing.

        Raises:
            FilterError: It does not go with this rollout's values.
        """
        try:
            return self._value(self._tree, values)
        except FilterError:
            raise
        except RecursionError as error:
            raise FilterError(f"{self.text!r} is nested too deeply") from error
        except (TypeError, ValueError, ArithmeticError, re.error) as error:
            raise FilterError(f"{self.text!r} cannot be evaluated: {error}") from error

    def _without_slashes(self, text: str, names: Sequence[str]) -> str:
        """The text with an identifier for every name that is none, string literals left alone."""
        slashed = sorted((name for name in names if not name.isidentifier()), key=len, reverse=True)
        known = "".join(f"{re.escape(name)}(?![\\w/])|" for name in slashed)
        pattern = (
            rf"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?<![\w/])(?P<name>{known}(?:reward|column|environment)/[\w.]+)"""
        )

        def replace(found: re.Match[str]) -> str:
            if found["name"] is None:
                return found[0]
            identifier = f"_slashed_{len(self._names)}"
            self._names[identifier] = found["name"]
            return identifier

        return re.sub(pattern, replace, text)

    def _check(self, node: ast.AST, names: Sequence[str]) -> None:
        if isinstance(node, ast.Name):
            name = self._names.get(node.id, node.id)
            if name not in names and name not in _FUNCTIONS:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                listed = ", ".join(name for name in names if not name.startswith(COLUMN_PREFIX))
                raise FilterError(f"{self.text!r}: there is no {name!r}{hint}; there are {listed}")
        elif not isinstance(node, _ALLOWED) or (isinstance(node, ast.Constant) and isinstance(node.value, bytes)):
            raise FilterError(
                f"{self.text!r}: {_words(node)} is not allowed; conditions have names, constants, comparisons, "
                f"and, or, not, in, + - * / and {', '.join(f'{name}()' for name in _FUNCTIONS)}"
            )
        elif isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS):
            raise FilterError(f"{self.text!r}: only {', '.join(f'{name}()' for name in _FUNCTIONS)} can be called")

    def _value(self, node: ast.expr, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=identifier):
                return values.get(self._names.get(identifier, identifier))
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [self._value(part, values) for part in parts]
            case ast.BoolOp(op=ast.And(), values=parts):
                return all(self._value(part, values) for part in parts)
            case ast.BoolOp(values=parts):
                return any(self._value(part, values) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._value(operand, values)
            case ast.UnaryOp(op=sign, operand=operand):
                value = self._value(operand, values)
                return None if value is None else -value if isinstance(sign, ast.USub) else +value
            case ast.Compare(left=first, ops=ops, comparators=others):
                parts = [self._value(part, values) for part in (first, *others)]
                return all(self._compare(op, a, b) for op, a, b in zip(ops, parts, parts[1:], strict=False))
            case ast.BinOp(left=left, op=op, right=right):
                return self._calculate(op, self._value(left, values), self._value(right, values))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                given = [self._value(argument, values) for argument in arguments]
                return None if None in given else _FUNCTIONS[name](*given)
        raise AssertionError(f"{ast.dump(node)} was let through")

    def _compare(self, op: ast.cmpop, left: Any, right: Any) -> bool:
        if isinstance(op, ast.Eq | ast.Is):
            return left == right
        if isinstance(op, ast.NotEq | ast.IsNot):
            return left != right
        if left is None or right is None:
            return False
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, str | list | tuple | dict) or (
                isinstance(right, str) and not isinstance(left, str)
            ):
                raise FilterError(f"{self.text!r}: {_shown(left)} cannot be `in` {_shown(right)}")
            return (left in right) is isinstance(op, ast.In)
        if isinstance(left, str) != isinstance(right, str):
            text, number = (left, right) if isinstance(left, str) else (right, left)
            raise FilterError(
                f"{self.text!r} compares the text {_shown(text)} with {_shown(number)}: write a text in quotes, or "
                "number(...) around what holds one"
            )
        return _COMPARISONS[type(op)](left, right)

    def _calculate(self, op: ast.operator, left: Any, right: Any) -> Any:
        if left is None or right is None:
            return None
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise FilterError(f"{self.text!r} calculates with {_shown(left)} and {_shown(right)}: only numbers can be")
        return _ARITHMETIC[type(op)](left, right)


_ALLOWED = (
    *(ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not),
    *(ast.USub, ast.UAdd, ast.Compare, ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn, ast.BinOp, ast.Call),
    *_COMPARISONS,
    *_ARITHMETIC,
)


def _names(values: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*OWN_NAMES, *(name for known in values for name in known)]))


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _words(node: ast.AST) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(node).__name__).lower()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
