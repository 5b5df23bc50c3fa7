"""The debug recipes of GLIDE and ADM from records to pictures, with the guides of the same bundle; in this process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unclip.config.base import ConfigError
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.recipes import RECIPES
from unclip.training.in_process import local_batches
from unclip.training.loop import Trainer
from unclip.training.publish import publish
from unclip.training.run_folder import RunFolder
from unclip.training.setup import prepare_run


def train(stage: str, recipe: str, folder: Path, openmoji: str) -> None:
    """Two steps of a debug recipe on real drawings, exported into `folder`/bundle."""
    places = {
        "run": str(folder / stage),
        "bundle": str(folder / "bundle"),
        "data": {"path": f"{openmoji}/64/train"},
    }
    prepared = prepare_run(RECIPES[stage][recipe]().merged(places))  # type: ignore[index]
    run = RunFolder(prepared.config.run)
    run.open(prepared.config)
    assert Trainer(prepared.config, rank=0, device=torch.device("cpu")).train(local_batches(prepared))["step"] == 2
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in run.metrics())
    publish(prepared)


@pytest.mark.parametrize(
    ("recipe", "prompts"), [("glide_debug", ["a red heart", "a green circle"]), ("adm_debug", ["red", "none"])]
)
def test_records_become_pictures(recipe: str, prompts: list[str], openmoji: str, tmp_path: Path) -> None:
    train("decoder", recipe, tmp_path, openmoji)
    train("classifier", "debug", tmp_path, openmoji)
    train("noised_clip", "debug", tmp_path, openmoji)
    bundle = Bundle.load(str(tmp_path / "bundle"))
    assert set(bundle.configs) == {"noised_clip", "classifier", "decoder"}
    assert bundle.clip is None
    assert {"red", "green", "none"} <= set(bundle.configs["classifier"].classes)  # type: ignore[union-attr]

    def pictures(**decoder: Any) -> np.ndarray[Any, Any]:
        options = GenerationOptions().merged({"decoder": decoder})
        output = Pipeline.from_bundle(bundle, options=options)(prompts, [1, 2], options=options)
        assert output.image_embed is None
        assert output.images[64].shape == (2, 64, 64, 3)
        return output.images[64].astype(int)

    plain = pictures()
    guided = {"clip_guidance_scale": 50.0, "classifier_guidance_scale": 50.0, "class_label": "red"}
    assert np.abs(pictures(**guided) - plain).max() > 2
    with pytest.raises(ConfigError, match=r"class_label = 'redd': none of the \d+ classes; did you mean 'red'\?"):
        pictures(classifier_guidance_scale=1.0, class_label="redd")
