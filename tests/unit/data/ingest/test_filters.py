"""The language of row filters against Python's own reading of it, nulls by SQL's rules, and every refusal."""

from __future__ import annotations

import itertools
import sys
from decimal import Decimal
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from unclip.config.base import ConfigError
from unclip.data.ingest.filters import compile_filter, parse_filter

TABLE = pa.table(
    {
        "nsfw": pa.array([0.1, 0.5, None, 0.25], pa.float32()),
        "aesthetic": pa.array([5, 4, 6, 7], pa.int8()),
        "views": pa.array([0, 2**60, 3, 4], pa.uint64()),
        "half": pa.array(np.array([1, 2, 3, 4], np.float16)),
        "price": pa.array([Decimal("1.50"), Decimal("2.50"), None, Decimal("0.10")]),
        "lang": ["en", "de", "fr", None],
        "licence": pa.array(["by", "by-sa", None, "by"]).dictionary_encode(),
        "large": pa.array(["a", "b", "c", "d"], pa.large_string()),
        "checked": [True, None, False, True],
        "tags": [["x"], [], None, ["y"]],
    }
)


def passes(text: str) -> list[bool | None]:
    return compile_filter(text, TABLE.schema).evaluate(TABLE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nsfw < 0.3", [True, False, None, True]),
        ("not nsfw < 0.4", [False, True, None, False]),
        ("nsfw is None", [False, False, True, False]),
        ("nsfw is not None and nsfw < 0.2", [True, False, False, False]),
        ("aesthetic >= 5", [True, False, True, True]),
        ("aesthetic > -1", [True] * 4),
        ("views > -1", [True] * 4),
        ("views == 3", [False, False, True, False]),
        ("1 < half <= 3", [False, True, True, False]),
        ("price == 1.5", [True, False, None, False]),
        ("lang in ('en', 'de')", [True, True, False, None]),
        ("lang not in ['en']", [False, True, True, None]),
        ("lang in ()", [False, False, False, None]),
        ("aesthetic in {4, 7}", [False, True, False, True]),
        ("'en' == lang", [True, False, False, None]),
        ("lang < 'e'", [False, True, False, None]),
        ("licence != 'by'", [False, True, None, False]),
        ("large == 'c'", [False, False, True, False]),
        ("checked", [True, None, False, True]),
        ("not checked or aesthetic == 4", [False, True, True, False]),
        ("checked == False", [False, None, True, False]),
        ("checked and lang == 'de'", [False, None, False, None]),
        ("lang == 'en' and (nsfw < 0.01 or aesthetic > 4)", [True, False, False, None]),
    ],
)
def test_what_passes(text: str, expected: list[bool | None]) -> None:
    assert passes(text) == expected


def test_without_nulls_it_is_python() -> None:
    rows = [dict(zip("xyz", values, strict=True)) for values in itertools.product((0, 1, 2), (0.5, 1.0), ("a", "b"))]
    table = pa.Table.from_pylist(rows)
    atoms = ["x < y", "x <= y < 2", "z == 'a'", "not x != 1", "z in ('b', 'c')", "x not in (1, 2)", "y > -1 or x == 2"]
    for first, second, join in itertools.product(atoms, atoms, ("and", "or", "and not")):
        text = f"({first}) {join} ({second})"
        expected = [eval(text, {}, dict(row)) for row in rows]
        assert compile_filter(text, table.schema).evaluate(table) == expected, text


def test_columns_are_those_it_reads_in_order() -> None:
    assert compile_filter("lang == 'x' and nsfw < aesthetic and lang != 'y'", TABLE.schema).columns == (
        "lang",
        "nsfw",
        "aesthetic",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nfsw < 1", r"there is no column 'nfsw' \(did you mean 'nsfw'\?\) at position 1"),
        ("nsfw < 1 and zebra == 2", r"there is no column 'zebra' \(columns: nsfw, .*\) at position 14"),
        ("nsfw < 'a'", "a number is compared with a string at position 8"),
        ("lang in ('a', 3)", "a string is compared with a number at position 15"),
        ("checked == 1", "a boolean is compared with a number at position 12"),
        ("tags == 'x'", r"column 'tags' is list<.*string>; .* at position 1"),
        ("nsfw", "a number is no condition at position 1"),
        ("lang in nsfw", "wants a list of literals"),
        ("nsfw is 3", "only goes with None"),
        ("1 < 2", "names no column"),
        ("  nsfw <", "invalid syntax at its end"),
        ("nsfw < < 1", "invalid syntax at position 8"),
        ("nsfw = 1", "invalid syntax"),
        ("", "invalid syntax"),
        ("nsfw\0 < 1", "null bytes"),
        ("(" * 300 + "checked" + ")" * 300, "too many nested parentheses"),
        ("not " * 2000 + "checked", "nested too deeply"),
        ("-" * 5000 + "1 < nsfw", "nested too deeply"),
        ("not " * 100 + "checked", "nested too deeply: it may have 100 levels"),
        ("a" * 10_001, "at most 10000 characters"),
    ],
)
def test_refusals_name_the_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_filter(text, TABLE.schema)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "nsfw.real < 1",
        "nsfw[0] < 1",
        "(lambda: 1)() == nsfw",
        "[x for x in (1,)] == nsfw",
        "f'{nsfw}' == lang",
        "(nsfw := 1) < 2",
        "nsfw + 1 < 2",
        "lang if checked else large",
        "nsfw < 1j",
        "lang == b'en'",
        "nsfw < ...",
        "lang in (*lang,)",
    ],
)
def test_nothing_else_of_python_is_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="position"):
        compile_filter(text, TABLE.schema)


def test_the_depth_that_is_allowed_is_evaluated_whatever_the_interpreter_allows(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    for limit in (1000, 10_000):
        sys.setrecursionlimit(limit)
        assert passes("not " * 98 + "checked") == [True, None, False, True]
        with pytest.raises(ConfigError, match="nested too deeply"):
            passes("not " * 99 + "checked")


def test_a_long_chain_is_evaluated() -> None:
    assert passes(" or ".join(["checked"] * 900)) == [True, None, False, True]


def test_syntax_alone_needs_no_columns() -> None:
    parse_filter("anything < 3")
    with pytest.raises(ConfigError, match="never closed"):
        parse_filter("(a < 1")
