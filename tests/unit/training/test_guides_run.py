"""The debug recipes of the decoder's guides, trained and exported as the jobs do it, but in this process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from unclip.pipelines.bundle import Bundle
from unclip.pipelines.guides import GuideOptions, build_guide
from unclip.recipes import RECIPES
from unclip.training import checkpoint
from unclip.training.export import full_state_dict
from unclip.training.in_process import local_batches
from unclip.training.loop import Trainer
from unclip.training.publish import publish
from unclip.training.run_folder import RunFolder
from unclip.training.setup import prepare_run

METRICS = {
    "noised_clip": {"accuracy", "logit_scale"},
    "classifier": {"accuracy", "accuracy_t1", "accuracy_t2", "accuracy_t3", "accuracy_t4"},
}


@pytest.mark.parametrize("stage", METRICS)
def test_a_guide_trains_and_is_there_in_the_bundle(stage: str, openmoji: str, tmp_path: Path) -> None:
    places = {
        "run": str(tmp_path / "run"),
        "bundle": str(tmp_path / "bundle"),
        "data": {"path": f"{openmoji}/64/train"},
    }
    prepared = prepare_run(RECIPES[stage]["debug"]().merged(places))  # type: ignore[index]
    run = RunFolder(prepared.config.run)
    run.open(prepared.config)
    trainer = Trainer(prepared.config, rank=0, device=torch.device("cpu"))
    trainer.train(local_batches(prepared, start=0))
    for record in run.metrics():
        assert METRICS[stage] <= record.keys()
        assert math.isfinite(record["loss"])
        assert record["grad_norm"] > 0
    publish(prepared)

    bundle = Bundle.load(str(tmp_path / "bundle"))
    newest = checkpoint.latest(run.checkpoints_uri)
    assert newest is not None
    config, model = bundle.configs[stage], bundle.load_model(stage)  # type: ignore[index,arg-type]
    expected = full_state_dict(newest, "ema")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert config == prepared.config.objective.stage_config()
    guide = build_guide(config, model)
    label = getattr(config, "classes", (None,))[0]
    options = GuideOptions(class_label=label, classifier_guidance_scale=float(label is not None))
    log_probability = guide.log_probability(guide.target(["a red heart"], options))
    x_t = torch.zeros(1, 3, 64, 64)
    assert math.isfinite(float(log_probability(x_t, torch.tensor([500]), None)))
