"""The command line of every job."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from unclip.config.base import Config
from unclip.config.cli import parse_flags, parse_job


class Job(Config):
    steps: int = Field(default=10, gt=0)
    """Steps to take."""
    out: str = "runs/x"


RECIPES = {"debug": lambda: Job(steps=2), "paper": lambda: Job(steps=1_000_000)}


def test_first_recipe_is_the_default_and_settings_are_laid_over_it(tmp_path) -> None:
    file = tmp_path / "changes.yaml"
    file.write_text("out: elsewhere\nsteps: 4\n")
    arguments = parse_job("d", RECIPES, ["--config", str(file), "--set", "steps=5", "--dry-run"])
    assert arguments.config == Job(steps=5, out="elsewhere")
    assert arguments.dry_run
    assert parse_job("d", RECIPES, []).config == Job(steps=2)
    assert parse_job("d", RECIPES, ["--recipe", "paper"]).config.steps == 1_000_000


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--recipe", "papr"], ["recipe 'papr'", "debug, paper", "did you mean 'paper'"]),
        (["--set", "steps=0"], ["steps = 0", "greater than 0"]),
        (["--set", "stepz=1"], ["stepz", "did you mean 'steps'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_bad_arguments_end_with_status_2_and_a_message(argv, parts, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_job("d", RECIPES, argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_help_lists_every_field_of_the_recipe(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_job("Does a thing.", RECIPES, ["--recipe", "paper", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in ("Does a thing.", "steps = 1000000  (Steps to take.)", 'out = "runs/x"', "--dry-run"):
        assert part in text


class Look(Config):
    """What a small job may be told."""

    runs: tuple[str, ...] = Field(min_length=1)
    """Folders to look at."""
    zero: Literal[0, 1, 2, 3] = 1
    """Stage of ZeRO."""
    max_rate: float = Field(default=0.5, gt=0)
    """Share, 100% at most."""
    links: tuple[float, ...] = (25.0, 50.0)
    """Bandwidths."""
    name: str | None = None
    """What it is called."""
    follow: bool = False
    """Goes on."""


def look(*argv: str) -> Look:
    return parse_flags("Looks.", Look, argv, positional="runs")


def test_flags_are_the_fields_of_a_configuration() -> None:
    assert look("a", "b") == Look(runs=("a", "b"))
    assert look("a", "--links", "1", "2e1", "--zero", "3", "--max-rate", "1e-2", "--follow", "--name", "007") == Look(
        runs=("a",), links=(1.0, 20.0), zero=3, max_rate=0.01, follow=True, name="007"
    )
    assert look("1", "--no-follow").runs == ("1",)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["RUNS"]),
        (["a", "--zero", "4"], ["zero = 4"]),
        (["a", "--max-rate", "-1"], ["max_rate = -1", "greater than 0"]),
        (["a", "--zeroes", "4"], ["--zeroes"]),
        (["a", "--nam", "x"], ["--nam"]),
        (["a", "--links", "x", "1"], ["links.0 = 'x'"]),
    ],
)
def test_bad_flags_end_with_status_2_and_a_message(argv, parts, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        look(*argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_help_of_flags_comes_from_the_fields(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        look("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "Looks.",
        "RUNS",
        "Folders to look at.",
        "--zero {0,1,2,3}",
        "100% at most. (default: 0.5)",
        "25.0 50.0",
    ):
        assert part in text
