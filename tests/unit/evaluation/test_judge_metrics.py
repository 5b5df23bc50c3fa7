"""Compositional accuracy of a whole evaluation, and nearest training pictures on its page: against what is known of squares."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.support.judge import COMBINATIONS, caption_of, write_squares

from unclip.config.base import ConfigError
from unclip.evaluation.config import EvaluatePicturesConfig
from unclip.evaluation.feature_folder import FeatureFolder
from unclip.evaluation.judge.folder import Judge
from unclip.evaluation.neighbours import nearest
from unclip.models.clip import ClipModel

Build = Callable[..., EvaluatePicturesConfig]
Run = Callable[[EvaluatePicturesConfig], dict[str, Any]]
NUMBERS = range(180)


def attributes(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    names = ("colour", "count", "all")
    assert {name for name in found if name.startswith("attribute_")} == {f"attribute_{name}" for name in names}
    return {name: found[f"attribute_{name}"] for name in names}


def test_pictures_that_show_their_captions_are_found_right(
    config: Build, evaluate: Run, squares_judge: str, tmp_path: Path
) -> None:
    """Pictures that the judge has never seen, of captions that it knows, and one that it does not."""
    drawn = write_squares(tmp_path / "drawn", [*NUMBERS, 500], seed=7)
    found = attributes(evaluate(config(pictures=drawn, reference=None, judge=squares_judge))["metrics"])
    constant = {"colour": 1 / 3, "count": 1 / 2, "all": 1 / 6}
    for name, values in found.items():
        assert values["pictures"] == len(NUMBERS)
        assert values["low"] <= values["mean"] <= values["high"]
        assert values["mean"] > 0.97
        assert values["real"] > 0.97
        assert values["constant"] == pytest.approx(constant[name])


def test_with_captions_of_others_they_fall_to_chance(
    config: Build, evaluate: Run, squares_judge: str, tmp_path: Path
) -> None:
    order = np.random.default_rng(0).permutation(NUMBERS)
    captions = [caption_of(number) for number in order.tolist()]
    dealt = write_squares(tmp_path / "dealt", NUMBERS, seed=7, captions=captions)
    settings = config(pictures=dealt, reference=None, judge=squares_judge)
    found = attributes(evaluate(settings)["metrics"])
    shown = [(COMBINATIONS[own % 6], COMBINATIONS[other % 6]) for own, other in zip(NUMBERS, order, strict=True)]
    truth = {
        "colour": np.mean([own[0] == other[0] for own, other in shown]),
        "count": np.mean([own[1] == other[1] for own, other in shown]),
        "all": np.mean([own == other for own, other in shown]),
    }
    chance = {"colour": 1 / 3, "count": 1 / 2, "all": 1 / 6}
    for name, values in found.items():
        assert values["mean"] == pytest.approx(truth[name], abs=0.03)  # what the judge itself gets wrong
        assert values["low"] < chance[name] < values["high"]
    table = pq.read_table(Path(settings.out) / "attributes.parquet").to_pylist()
    right = [row["colour"] == row["colour_found"] and row["count"] == row["count_found"] for row in table]
    assert found["all"]["mean"] == pytest.approx(np.mean(right))
    assert [(row["id"], row["caption"]) for row in table] == list(zip(NUMBERS, captions, strict=True))


def test_a_picture_is_judged_by_the_network_that_does_not_know_its_caption(
    config: Build, evaluate: Run, squares: str, squares_judge: str
) -> None:
    """So the real pictures themselves come to what the judge was found to get on unseen ones, not to what it remembers."""
    found = attributes(evaluate(config(pictures=squares, reference=None, judge=squares_judge))["metrics"])
    known = Judge.load("judge", squares_judge)
    for index, name in enumerate(found):
        assert found[name]["mean"] == pytest.approx(known.captions.right[:, index].mean())
        assert found[name]["mean"] == pytest.approx(known.facts["accuracy"][name]["right"])
        assert found[name]["real"] == pytest.approx(found[name]["mean"])


def test_the_page_shows_what_was_judged_wrong_and_right(
    config: Build, evaluate: Run, squares_judge: str, tmp_path: Path
) -> None:
    captions = [caption_of(number + 2) for number in NUMBERS]  # every colour is another
    drawn = write_squares(tmp_path / "drawn", NUMBERS, seed=7, captions=captions)
    settings = config(pictures=drawn, reference=None, judge=squares_judge, show=3)
    found = attributes(evaluate(settings)["metrics"])
    assert found["colour"]["mean"] < 0.03
    assert found["count"]["mean"] > 0.97
    page = (Path(settings.out) / "report.html").read_text()
    wrong = page[page.index("Judged wrong") : page.index("Judged right")]
    said = re.findall(r"<figcaption>(one|two) (\w+), drawing \d+: (\w+) for (\w+), (\d)<", wrong)
    assert len(said) == 3
    assert all(stated == of_caption and answer != stated for _, of_caption, answer, stated, _ in said)
    assert all(count == {"one": "1", "two": "2"}[word] for word, *_, count in said)


def test_without_a_caption_that_it_knows_nothing_is_said(
    config: Build, evaluate: Run, squares_judge: str, pictures: str
) -> None:
    found = evaluate(config(judge=squares_judge))["metrics"]
    assert not [name for name in found if name.startswith("attribute_")]


def test_a_folder_is_of_one_judge(config: Build, evaluate: Run, squares: str, squares_judge: str) -> None:
    settings = config(pictures=squares, reference=None, judge=squares_judge)
    result = evaluate(settings)
    assert result["protocol"]["judge"]["sha256"] == Judge.load("judge", squares_judge).fingerprint
    with pytest.raises(ConfigError, match="was begun with judge"):
        evaluate(settings.merged({"judge": None}))


def test_training_pictures_themselves_are_found(
    config: Build, evaluate: Run, clip: ClipModel, pictures: str, reference: str, tmp_path: Path
) -> None:
    """A generator that copies: every picture is a training picture, of another caption; held-out ones are not."""
    settings = config(training=pictures, limit=40)
    result = evaluate(settings)
    found = result["metrics"]["training"]
    assert found["pictures"] == 40
    assert result["protocol"]["training"]["rows"] == 60  # all of them, whatever the limit
    assert found["similarity"] == pytest.approx(1, abs=1e-6)
    assert found["near_share"] == 1
    assert found["held_out_largest"] < 1 - 1e-6
    features, own = (
        FeatureFolder(f"{settings.out}/features/{name}").read(["clip"]).columns["clip"]
        for name in ("training", "reference")
    )
    truth = nearest(own, features)
    assert found["held_out_similarity"] == pytest.approx(truth.similarities.mean(), abs=1e-6)
    page = (Path(settings.out) / "report.html").read_text()
    rows = page[page.index("Nearest training pictures") :].split("<tr>")
    pairs = [re.findall(r"(drawing \d+ \(\d+\))</td>", row) for row in rows if row.count("<img") == 2]
    assert len(pairs) == settings.show
    assert all(first == second for first, second in pairs)


def test_features_of_training_pictures_can_be_used_again(
    config: Build, evaluate: Run, pictures: str, tmp_path: Path
) -> None:
    first = config(training=pictures)
    made = evaluate(first)["metrics"]["training"]
    again = config(training=f"{first.out}/features/training", out=str(tmp_path / "again"))
    assert evaluate(again)["metrics"]["training"] == made
    assert not (tmp_path / "again" / "features" / "training").exists()
