"""examples/add_a_stage.py: what it minimises has a closed form where the network is linear, and decoders take what it says."""

from __future__ import annotations

from pathlib import Path

import torch
from examples.add_a_stage import RegressorConfig, RegressorObjectiveConfig, RegressorStageConfig, image_embeddings
from tests.support.bundles import save_tiny_bundle

from unclip.pipelines.pipeline import Pipeline
from unclip.utils.random import SampleGenerator

SAMPLES, WIDTH = 64, 5


def test_a_linear_regressor_comes_to_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    z_t, noise = torch.randn(2, SAMPLES, WIDTH, generator=generator)
    z_i = z_t @ torch.randn(WIDTH, WIDTH, generator=generator) + 0.5 + 0.3 * noise
    stage = RegressorStageConfig(model=RegressorConfig(embed_dim=WIDTH, width=0))
    objective = RegressorObjectiveConfig(stage=stage).build()
    batch = {"text_embed": z_t, "image_embed": z_i}
    streams = SampleGenerator.for_samples(0, torch.arange(SAMPLES))
    optimizer = torch.optim.LBFGS(objective.model.parameters(), max_iter=200, tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective.loss(objective.model, batch, streams).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    inputs = torch.cat([z_t, torch.ones(SAMPLES, 1)], dim=1)
    expected = inputs @ torch.linalg.lstsq(inputs, z_i).solution
    torch.testing.assert_close(objective.model(z_t).detach(), expected, rtol=1e-4, atol=1e-4)
    output = objective.loss(objective.model, batch, streams)
    torch.testing.assert_close(output.loss.detach(), (z_i - expected).square().sum(dim=1).mean())
    assert 0 < float(output.metrics["cosine"]) < 1


def test_its_embeddings_go_where_those_of_any_prior_go(tmp_path: Path) -> None:
    save_tiny_bundle(str(tmp_path))
    pipeline = Pipeline.from_bundle(str(tmp_path), "cpu")
    z_t = pipeline.encode_text(["a red heart"])
    z_i = image_embeddings(RegressorConfig(embed_dim=z_t.shape[1]).build(), z_t)
    pictures, others = (
        pipeline.draw(seeds=[0]).decode(prompts=["a red heart"], image_embed=embedding) for embedding in (z_i, -z_i)
    )
    assert pictures.shape == (1, 16, 16, 3)
    assert (pictures != others).any()
