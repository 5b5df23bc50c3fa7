"""Lists of prompts in units: every row is in one of them, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unclip.config.base import ConfigError
from unclip.data.manifest import DataError
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.prompts import list_prompts, read_unit


def prompts_of(config: GenerateConfig) -> list[tuple[int, Any]]:
    """(row, prompt) of every unit."""
    found = []
    for unit in list_prompts(config).units:
        records = list(read_unit(config, unit))
        assert len(records) == unit.rows <= config.prompts_per_shard
        found += [(unit.first_row + i, record.values.get("prompt")) for i, record in enumerate(records)]
    return found


TEXTS = [f"prompt {number}" for number in range(23)]


def write(folder: Path, form: str, texts: list[str]) -> Path:
    path = folder / f"prompts.{form}"
    lines = {
        "txt": [*texts],
        "csv": ["prompt,x", *(f'"{text}",1' for text in texts)],
        "tsv": ["x\tprompt", *(f"1\t{text}" for text in texts)],
        "jsonl": [json.dumps({"prompt": text}) for text in texts],
    }
    if form == "parquet":
        with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as writer:
            for start in range(0, len(texts), 9):
                writer.write_table(pa.table({"prompt": texts[start : start + 9]}))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines[form]).encode() + b"\r\n\r\n")
    return path


@pytest.mark.parametrize("form", ["txt", "csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("most", [1, 4, 256])
def test_units_hold_every_row_once(tmp_path: Path, form: str, most: int) -> None:
    config = GenerateConfig(prompts=str(write(tmp_path, form, TEXTS)), prompts_per_shard=most)
    assert prompts_of(config) == list(enumerate(TEXTS))


def test_the_lists_of_a_folder_are_one_after_the_other(tmp_path: Path) -> None:
    for name, form in (("a", "jsonl"), ("b", "parquet"), ("c", "txt")):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, form, [f"{name} {text}" for text in TEXTS[:5]]).rename(tmp_path / f"{name}.{form}")
    config = GenerateConfig(prompts=str(tmp_path), prompts_per_shard=3)
    assert [prompt for _, prompt in prompts_of(config)] == [f"{name} {text}" for name in "abc" for text in TEXTS[:5]]
    assert [unit.index for unit in list_prompts(config).units] == list(range(6))


@pytest.mark.parametrize("form", ["txt", "csv", "jsonl", "parquet"])
def test_a_changed_list_is_another(tmp_path: Path, form: str) -> None:
    config = GenerateConfig(prompts=str(write(tmp_path, form, TEXTS)))
    before = list_prompts(config).identity
    write(tmp_path, form, [*TEXTS[:-1], "prompt 2x"])  # of the same length
    assert list_prompts(config).identity != before
    write(tmp_path, form, TEXTS)
    assert list_prompts(config).identity == before


def test_a_list_that_has_lost_rows_is_noticed(tmp_path: Path) -> None:
    config = GenerateConfig(prompts=str(write(tmp_path, "jsonl", TEXTS)), prompts_per_shard=10)
    unit = list_prompts(config).units[1]
    write(tmp_path, "jsonl", TEXTS[:15])
    with pytest.raises(DataError, match="has changed"):
        list(read_unit(config, unit))


def test_rows_behind_a_broken_page_are_rows_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", TEXTS)
    offset = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    config = GenerateConfig(prompts=str(path), prompts_per_shard=9)
    problems = [record.problem is not None for unit in list_prompts(config).units for record in read_unit(config, unit)]
    assert problems == [False] * 9 + [True] * 9 + [False] * 5


def test_a_line_that_is_too_long_for_a_prompt_does_not_hide_the_next(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "y" * 3_000_000}) + '\n{"prompt": NaN}\n[1]\n{"prompt": "last"}\n')
    config = GenerateConfig(prompts=str(path))
    assert prompts_of(config)[-1] == (3, "last")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "prompt = None, prompts = None: give one"),
        ({"prompt": "a", "prompts": "b"}, "give one of them"),
        ({"prompts": "{folder}/nowhere.txt"}, "nowhere.txt' does not exist"),
        ({"prompts": "{folder}/a.csv"}, r"prompt_column = 'prompt': .*a.csv' has no such column, but text, n"),
        ({"prompts": "{folder}/empty.txt"}, "holds no prompts"),
        ({"prompts": "{folder}/a.pdf"}, "a.pdf': does not end in .jsonl"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(tmp_path: Path, fields: dict[str, str], message: str) -> None:
    (tmp_path / "a.csv").write_text("text,n\na dog,1\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "a.pdf").write_text("x")
    given = {name: value.format(folder=tmp_path) for name, value in fields.items()}
    with pytest.raises(ConfigError, match=message):
        list_prompts(GenerateConfig(**given))


def test_a_list_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not readable Parquet"):
        list_prompts(GenerateConfig(prompts=str(tmp_path / "a.parquet")))


def test_the_one_prompt_is_a_list_of_one(config: Callable[..., GenerateConfig]) -> None:
    assert prompts_of(config(prompt="a dog")) == [(0, "a dog")]
