"""An autoregressive prior from records to a bundle: embedded, reduced to components, trained, exported, sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.embedded import save_clip

from unclip.data.pca import PrincipalComponents
from unclip.models.ar_prior import ARPriorModel
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.stages import ARPriorStageConfig
from unclip.recipes import RECIPES
from unclip.recipes.clip import tiny_architecture
from unclip.training.in_process import embed_here, local_batches
from unclip.training.loop import Trainer
from unclip.training.publish import publish
from unclip.training.run_folder import RunFolder
from unclip.training.setup import prepare_run
from unclip.utils.random import SampleGenerator


def test_records_become_a_stage(openmoji: str, tmp_path: Path) -> None:
    clip = save_clip(str(tmp_path), tiny_architecture())
    data = embed_here(f"{openmoji}/64/train", str(tmp_path / "embedded"), clip)
    recipe = RECIPES["prior"]["ar_debug"]()
    changes = {
        "run": str(tmp_path / "run"),
        "bundle": str(tmp_path / "bundle"),
        "clip": clip,
        "data": {"path": data},
        "objective": {"pca": f"{data}/pca.safetensors", "stage": {"model": {"num_components": 5}}},
    }
    prepared = prepare_run(recipe.merged(changes))
    RunFolder(prepared.config.run).open(prepared.config)
    trainer = Trainer(prepared.config, rank=0, device=torch.device("cpu"))
    summary = trainer.train(local_batches(prepared, start=0))
    assert summary["step"] == 2
    publish(prepared)

    bundle = Bundle.load(str(tmp_path / "bundle"))
    stage, model = bundle.configs["prior"], bundle.load_model("prior")
    assert isinstance(stage, ARPriorStageConfig)
    assert isinstance(model, ARPriorModel)
    assert stage.model.num_components == 5
    basis = PrincipalComponents.load(f"{data}/pca.safetensors").first(5)
    torch.testing.assert_close(model.codec.components, torch.from_numpy(basis.components).float(), rtol=0, atol=0)
    torch.testing.assert_close(model.codec.deviations, torch.from_numpy(basis.eigenvalues).sqrt().float())
    text_embed = torch.nn.functional.normalize(torch.ones(2, 16), dim=1)
    tokens = torch.tensor([[49406, 320, 49407] + [0] * 13] * 2)
    streams = SampleGenerator.for_samples(0, torch.tensor([1, 2]))
    image_embed = stage.stage(model).sample(text_embed, tokens, streams, sampling=stage.sampling)
    assert image_embed.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
