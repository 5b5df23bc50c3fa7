"""The command line of every job."""

from __future__ import annotations

import pytest
from pydantic import Field

from unclip.config.base import Config
from unclip.config.cli import parse_job


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
