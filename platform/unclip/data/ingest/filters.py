"""`nsfw < 0.3 and lang in ("en", "de")`: conditions on a row's columns, in a small part of Python's grammar.

Names are columns; literals are numbers, strings, True and False; there are `== != < <= > >=` (also chained), `in` and
`not in` a list of literals, `is None`, `is not None`, `and`, `or`, `not` and brackets. Nothing is executed: the text is
parsed and turned into an Arrow expression. Numbers are compared as float64. A comparison with a null is null, and so may be
the whole; only rows for which it is true pass.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import acero

from unclip.config.base import ConfigError

_LONGEST = 10_000  # characters
_DEEPEST = 100  # levels of the syntax tree; the interpreter's own limit is not ours to rely on, libraries raise it
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_UNKNOWN = pc.scalar(pa.scalar(None, pa.bool_()))


@dataclass(frozen=True)
class Filter:
    """A condition made for tables of one schema.

    Args:
        text: as it was written.
        columns: names it reads, in the order of appearance.
        expression: the condition, a boolean for each row.
    """

    text: str
    columns: tuple[str, ...]
    expression: pc.Expression

    def evaluate(self, table: pa.Table) -> list[bool | None]:
        """Whether each row passes; None where a null leaves it open."""
        steps = [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(table.select(self.columns))),
            acero.Declaration("project", acero.ProjectNodeOptions([self.expression], ["passes"])),
        ]
        passes: list[bool | None] = (
            acero.Declaration.from_sequence(steps).to_table(use_threads=False)["passes"].to_pylist()
        )
        return passes


def compile_filter(text: str, schema: pa.Schema) -> Filter:
    """The filter `text` for tables with (at least) the columns of `schema`.

    Raises `ConfigError` naming the position of what is no condition of this language, names a column that is not there,
    or compares values of different kinds.
    """
    text = text.strip()
    compiler = _Compiler(text, schema)
    expression = compiler.condition(parse_filter(text))
    if not compiler.columns:
        raise ConfigError(f"filter {text!r} names no column")
    return Filter(text, tuple(compiler.columns), expression)


def parse_filter(text: str) -> ast.expr:
    """The syntax tree of a filter.

    Raises `ConfigError` naming the position where it is no expression, or that it is too long or too deep.
    """
    if len(text) > _LONGEST:
        raise ConfigError(f"a filter has at most {_LONGEST} characters, this one {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        place = f"position {error.offset}" if error.offset else "its end"
        raise ConfigError(f"filter {text!r}: {error.msg} at {place}") from None
    except (RecursionError, MemoryError):
        raise _too_deep(text) from None
    except ValueError as error:
        raise ConfigError(f"filter {text!r} cannot be read: {error}") from None
    level: list[ast.AST] = [tree]
    for _ in range(_DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise _too_deep(text)
    return tree


def _too_deep(text: str) -> ConfigError:
    return ConfigError(f"filter {text[:40]!r}... is nested too deeply: it may have {_DEEPEST} levels")


class _Compiler:
    """Turns syntax into Arrow; collects the columns that are named."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text = text
        self.schema = schema
        self.columns: dict[str, None] = {}

    def condition(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op, values):
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                return reduce(join, [self.condition(value) for value in values])
            case ast.UnaryOp(ast.Not(), operand):
                return ~self.condition(operand)
            case ast.Compare(left, ops, comparators):
                sides = [left, *comparators]
                pairs = [self._compare(*pair) for pair in zip(sides, ops, comparators, strict=False)]
                return reduce(operator.and_, pairs)
            case ast.Name() | ast.Constant():
                value, kind = self._value(node)
                if kind != "boolean":
                    raise self._error(node, f"a {kind} is no condition")
                return value
            case _:
                raise self._error(node, f"{type(node).__name__} is not part of this language")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        value, kind = self._value(left)
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._error(right, "`is` only goes with None")
            return value.is_null() if isinstance(op, ast.Is) else value.is_valid()
        if isinstance(op, ast.In | ast.NotIn):
            is_in = pc.if_else(value.is_valid(), value.isin(self._choices(right, kind)), _UNKNOWN)
            return is_in if isinstance(op, ast.In) else ~is_in
        other, other_kind = self._value(right)
        if kind != other_kind:
            raise self._error(right, f"a {kind} is compared with a {other_kind}")
        return _COMPARISONS[type(op)](value, other)

    def _choices(self, node: ast.expr, kind: str) -> pa.Array:
        if not isinstance(node, ast.Tuple | ast.List | ast.Set):
            raise self._error(node, "`in` wants a list of literals, as in ('a', 'b')")
        literals = [self._literal(element) for element in node.elts]
        for element, (_, found) in zip(node.elts, literals, strict=True):
            if found != kind:
                raise self._error(element, f"a {kind} is compared with a {found}")
        types = {"number": pa.float64(), "string": pa.large_string(), "boolean": pa.bool_()}
        return pa.array([value for value, _ in literals], types[kind])

    def _value(self, node: ast.expr) -> tuple[pc.Expression, str]:
        """The expression of a column or literal, and its kind: `number`, `string` or `boolean`."""
        if isinstance(node, ast.Name):
            return self._column(node)
        value, kind = self._literal(node)
        return pc.scalar(value), kind

    def _column(self, node: ast.Name) -> tuple[pc.Expression, str]:
        name = node.id
        if self.schema.names.count(name) != 1:
            close = difflib.get_close_matches(name, self.schema.names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"columns: {', '.join(self.schema.names)}"
            raise self._error(node, f"there is no column {name!r} ({hint})")
        self.columns[name] = None
        found = self.schema.field(name).type
        stored = found.value_type if pa.types.is_dictionary(found) else found
        if pa.types.is_boolean(stored):
            return pc.field(name), "boolean"
        if pa.types.is_integer(stored) or pa.types.is_floating(stored) or pa.types.is_decimal(stored):
            return pc.field(name).cast(pa.float64(), safe=False), "number"
        if pa.types.is_string(stored) or pa.types.is_large_string(stored):
            return pc.field(name).cast(pa.large_string()), "string"
        raise self._error(node, f"column {name!r} is {found}; a filter reads numbers, strings and booleans")

    def _literal(self, node: ast.expr) -> tuple[Any, str]:
        match node:
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)) if not isinstance(value, bool):
                return -float(value), "number"
            case ast.Constant(bool() as value):
                return value, "boolean"
            case ast.Constant(int() | float() as value):
                return float(value), "number"
            case ast.Constant(str() as value):
                return value, "string"
            case _:
                raise self._error(node, "a column or a literal is expected")

    def _error(self, node: ast.expr, problem: str) -> ConfigError:
        return ConfigError(f"filter {self.text!r}: {problem} at position {node.col_offset + 1}")
