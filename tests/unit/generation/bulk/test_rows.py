"""Which rows can be done, and why the others cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest

from unclip.config.base import ConfigError
from unclip.data.sources.lists import Record
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.rows import Asked, Judge, Refused
from unclip.pipelines.stages import StageConfig


@pytest.fixture(scope="module")
def judge(tiny_configs: Mapping[str, StageConfig]) -> Judge:
    return Judge(GenerateConfig(seed=3, n=2), tiny_configs)


def asked(judge: Judge, values: Mapping[str, Any], *, is_text: bool = False) -> Asked:
    judged = judge.judge(5, Record(0, dict(values)), is_text=is_text)
    assert isinstance(judged, Asked), judged
    return judged


def refused(judge: Judge, values: Mapping[str, Any], *, is_text: bool = False) -> Refused:
    judged = judge.judge(5, Record(0, dict(values)), is_text=is_text)
    assert isinstance(judged, Refused), judged
    return judged


def test_a_row_says_what_it_wants_otherwise_than_the_job(judge: Judge) -> None:
    plain = asked(judge, {"prompt": " a dog "})
    assert (plain.prompt, plain.n, plain.seeds, plain.prompt_id, plain.fields) == ("a dog", 2, range(3, 5), None, "{}")
    given = {"id": 7, "seed": 11, "n": 3, "guidance_scale": 4, "num_inference_steps": 5, "size": 32, "note": "x"}
    mine = asked(judge, {"prompt": "a dog", **given})
    assert (mine.prompt_id, mine.n, mine.seeds, mine.fields) == ("7", 3, range(11, 14), '{"note":"x"}')
    settings = json.loads(mine.parameters)
    assert set(settings["sampling"]) == {"prior", "decoder", "upsampler_256"}
    assert settings["sampling"]["decoder"]["guidance_scale"] == 4.0
    assert settings["sampling"]["decoder"]["num_inference_steps"] == 5
    assert settings["precision"] == "fp32"
    assert json.loads(plain.parameters)["sampling"]["decoder"]["guidance_scale"] == 2.0  # as the bundle has it


def test_ids_follow_from_the_row_and_the_number_of_the_picture(judge: Judge) -> None:
    ids = [asked(judge, {"prompt": "a dog"}).picture_id(number) for number in (0, 1, 9_999)]
    assert ids == [50_000, 50_001, 59_999]


@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_empty_cell_is_not_given(judge: Judge, value: Any) -> None:
    names = ("id", "seed", "n", "guidance_scale", "num_inference_steps", "size")
    assert asked(judge, {"prompt": "a dog", **dict.fromkeys(names, value)}) == asked(judge, {"prompt": "a dog"})


@pytest.mark.parametrize("value", [3, 3.0, Decimal("3")])
def test_whole_numbers_may_come_as_others(judge: Judge, value: Any) -> None:
    """Tables without empty cells among whole numbers hold floats."""
    assert asked(judge, {"prompt": "a", "n": value, "seed": value}).seeds == range(3, 6)


@pytest.mark.parametrize("value", [3, 3.0, "3", " 3 "])
def test_the_callers_id_is_kept_as_text(judge: Judge, value: Any) -> None:
    assert asked(judge, {"prompt": "a", "id": value}).prompt_id == str(value).removesuffix(".0")


@pytest.mark.parametrize("text", ["3", " 3 ", "3.0", "+3", "3."])
def test_texts_of_tables_are_read_as_numbers(judge: Judge, text: str) -> None:
    assert asked(judge, {"prompt": "a", "n": text, "guidance_scale": text}, is_text=True).n == 3
    assert "n = " in refused(judge, {"prompt": "a", "n": text}).detail  # elsewhere a text is no number


@pytest.mark.parametrize(
    "given",
    [
        *(
            {"n": value}
            for value in (0, -1, 10_001, 2.5, float("nan"), float("inf"), 10**400, True, [2], {"a": 1}, "x")
        ),
        *({"seed": value} for value in (-1, 2**62 + 1, 2**70, 1e300, False, b"1")),
        *({"guidance_scale": value} for value in (-0.1, float("nan"), float("inf"), 10**400, True, [1.0], "nan")),
        *({"num_inference_steps": value} for value in (0, 51, 2**40)),
        *({"size": value} for value in (100, 1, 128, -16)),
        *({"id": value} for value in (True, 1.5, [1], {"a": 1}, "x" * 1001, "\udc80", 2**200, b"1")),
    ],
    ids=lambda given: f"{given!r:.40}",
)
def test_parameters_that_cannot_be_done(judge: Judge, given: dict[str, Any]) -> None:
    row = refused(judge, {"prompt": "a dog", **given})
    assert row.reason == "bad_parameters"
    assert next(iter(given)) in row.detail
    assert row.prompt == "a dog"
    assert len(row.detail.encode()) < 2000


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "1_0", "٣", "0x10", "1,5", "--1", "1" * 100_000 + "x"])
def test_texts_that_are_no_numbers(judge: Judge, text: str) -> None:
    for name in ("n", "guidance_scale"):
        assert refused(judge, {"prompt": "a", name: text}, is_text=True).reason == "bad_parameters"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (None, "empty"),
        ("", "empty"),
        (" \t\n ", "empty"),
        (3, "bad_prompt"),
        (["a dog"], "bad_prompt"),
        ("a\x00dog", "bad_prompt"),
        ("a\ndog", "bad_prompt"),
        ("a \udc80 dog", "bad_prompt"),
        ("x" * 2001, "too_long"),
        ("x" * (1 << 20), "too_long"),
        ("dog " * 15, "too_long"),  # 17 tokens with start and end, of 16
    ],
)
def test_prompts_that_cannot_be_done(judge: Judge, prompt: Any, reason: str) -> None:
    row = refused(judge, {"prompt": prompt})
    assert row.reason == reason
    assert row.prompt is None or len(row.prompt) <= 8000
    (row.prompt or "").encode()
    row.detail.encode()


def test_the_longest_prompt_that_is_read_whole(judge: Judge) -> None:
    assert asked(judge, {"prompt": "dog " * 14}).prompt == ("dog " * 14).strip()
    assert asked(judge, {"prompt": "família 👩‍👩‍👧 赤い"}).prompt == "família 👩‍👩‍👧 赤い"


def test_a_line_that_is_no_record(judge: Judge) -> None:
    row = judge.judge(5, Record(0, {}, "no JSON: …"))
    assert row == Refused(5, None, None, "bad_record", "no JSON: …")


def test_what_is_carried_along_is_json_that_everyone_reads(judge: Judge) -> None:
    values = {
        "a": float("nan"),
        "b": [1, {"c": float("inf"), "d": "\udc80"}],
        "e": b"\x00",
        "f": Decimal("1.5"),
        "\udc80": 1,
    }
    fields = asked(judge, {"prompt": "a", **values}).fields
    expected = {"a": None, "b": [1, {"c": None, "d": "\\udc80"}], "e": None, "f": "1.5", "\\udc80": 1}
    assert json.loads(fields, parse_constant=lambda name: pytest.fail(name)) == expected
    nested: Any = 1
    for _ in range(5000):
        nested = [nested]
    assert refused(judge, {"prompt": "a", "x": nested}).reason == "bad_record"
    assert refused(judge, {"prompt": "a", "x": "y" * 70_000}).reason == "bad_record"


def test_the_best_of_some_are_made_of_every_row(tiny_configs: Mapping[str, StageConfig]) -> None:
    judge = Judge(GenerateConfig(n=2, best_of=4), tiny_configs)
    assert asked(judge, {"prompt": "a", "n": 4, "seed": 7}).seeds == range(7, 11)
    assert asked(judge, {"prompt": "a"}).n == 2
    assert "from 1 to 4" in refused(judge, {"prompt": "a", "n": 5}).detail


def test_the_jobs_largest_size_is_that_of_every_row(tiny_configs: Mapping[str, StageConfig]) -> None:
    judge = Judge(GenerateConfig.from_dict({"options": {"up_to": 32}}), tiny_configs)
    assert asked(judge, {"prompt": "a", "size": 16}).options.up_to == 16
    assert "size = 64: this job makes 16, 32 pixels" in refused(judge, {"prompt": "a", "size": 64}).detail


def test_a_rows_steps_take_the_place_of_the_jobs_list_of_timesteps(tiny_configs: Mapping[str, StageConfig]) -> None:
    judge = Judge(GenerateConfig.from_dict({"options": {"decoder": {"timesteps_list": [40, 20, 0]}}}), tiny_configs)
    of_row = json.loads(asked(judge, {"prompt": "a", "num_inference_steps": 7}).parameters)["sampling"]["decoder"]
    assert (of_row["num_inference_steps"], of_row["timesteps_list"]) == (7, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed = -1"),
        ({"n": 10_001}, "n = 10001"),
        ({"n": 3, "best_of": 2}, "best_of = 2 is less than n = 3"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"encoding": "jpeg"}, "encoding = 'jpeg': format folder writes png"),
        ({"prompt_column": "seed"}, "prompt_column = 'seed'"),
        ({"options": {"prior": {"sampler": "euler"}}}, "options.prior.sampler = 'euler'"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerateConfig.from_dict(fields)
