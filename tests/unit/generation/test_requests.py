from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unclip.config.base import ConfigError
from unclip.generation.requests import GenerateConfig, Request, check_prompts, plan
from unclip.pipelines.cascade import Cascade
from unclip.pipelines.guides import GuideOptions


def config(**fields: Any) -> GenerateConfig:
    return GenerateConfig.from_dict({"bundle": "b", "out": "o", **fields})


def prompts_file(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    return str(path)


def test_every_prompt_gets_its_seeds() -> None:
    assert plan(config(prompt=" a dog ", seed=5, images_per_prompt=2)) == [
        Request(0, "a dog", 5),
        Request(0, "a dog", 6),
    ]
    assert Request(12, "a dog", 5).name == "00012-5.png"


@pytest.mark.parametrize("content", [b"a dog\na cat\n", b"a dog\r\na cat", b"\xef\xbb\xbfa dog\na cat"])
def test_prompts_are_lines(tmp_path: Path, content: bytes) -> None:
    requests = plan(config(prompts_file=prompts_file(tmp_path, content)))
    assert [(request.index, request.prompt) for request in requests] == [(0, "a dog"), (1, "a cat")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\n\n", "holds no prompts"),
        (b"a dog\n\na cat\n", "line 2: the prompt is empty"),
        (b"a dog\na cat\n\n", "line 3: the prompt is empty"),
        (b"a dog\na c\xe4t\n", "line 2: not UTF-8"),
        (b"a dog\n" + b"x" * 2001, "line 2: the prompt has 2001 characters; at most 2000"),
        (b"a dog\na\x00cat", "line 2: .* control characters"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config(prompts_file=prompts_file(tmp_path, content)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither is given"),
        ({"prompt": "a", "prompts_file": "b"}, "give one, not both"),
        ({"prompt": "  "}, "prompt: the prompt is empty"),
        ({"prompts_file": "nowhere.txt"}, "prompts_file = 'nowhere.txt': cannot be read: No such file"),
        ({"prompt": "a", "out": ""}, "out: required"),
        ({"prompt": "a", "bundle": ""}, "bundle: required"),
    ],
)
def test_what_is_missing_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed = -1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"device": "gpu"}, "device = 'gpu'"),
        (
            {"options": {"prior": {"sampler": "euler"}}},
            r"options.prior.sampler = 'euler': .*'ddpm', 'ddim', 'dpmsolver\+\+' or 'sde-dpmsolver\+\+'",
        ),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def cascade(context_length: int, classes: tuple[str, ...] = ()) -> Cascade:
    return Cascade({}, {}, GuideOptions(), context_length, classes)


def test_prompts_that_would_be_cut_are_refused(tmp_path: Path) -> None:
    settings = config(prompts_file=prompts_file(tmp_path, b"a dog\na red dog and a cat\n"))
    requests = plan(settings)
    check_prompts(settings, requests, cascade(8))
    with pytest.raises(ConfigError, match="line 2: the prompt has 8 tokens with start and end; the networks read 7"):
        check_prompts(settings, requests, cascade(7))


def test_prompts_that_are_no_class_are_refused_where_the_decoder_draws_classes(tmp_path: Path) -> None:
    settings = config(prompts_file=prompts_file(tmp_path, b"red\ngren\n"))
    requests = plan(settings)
    check_prompts(settings, requests, cascade(77))
    check_prompts(settings, requests, cascade(77, ("red", "gren")))
    with pytest.raises(ConfigError, match=r"line 2 = 'gren': none of the 2 classes; did you mean 'green'\?"):
        check_prompts(settings, requests, cascade(77, ("red", "green")))
