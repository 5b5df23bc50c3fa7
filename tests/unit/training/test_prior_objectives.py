"""What the autoregressive prior learns, and how it is fitted to the embeddings of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.objectives import build
from torch import nn
from torch.nn import functional

from unclip.config.base import ConfigError
from unclip.data.embedding import EmbeddingStatistics
from unclip.data.manifest import DataError
from unclip.data.pca import PrincipalComponents
from unclip.models.ar_prior import ARPriorModel
from unclip.models.prior import PriorCondition
from unclip.pipelines.stages import ARPriorStageConfig
from unclip.pipelines.stages.ar_prior import draw_codes
from unclip.recipes.ar_prior import paper
from unclip.training.objectives.ar_prior import ARPriorObjectiveConfig
from unclip.utils.random import SampleGenerator

D, K, LENGTH, END, COUNT = 6, 4, 5, 19, 8
SHAPE = {"context_length": LENGTH, "width": 32, "depth": 2, "heads": 2, "vocab_size": END + 1}
Batch = dict[str, torch.Tensor]


def make_batch() -> Batch:
    """Eight captions with text and image embeddings of unit norm."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, END, (COUNT, LENGTH), generator=random, dtype=torch.int32)
    tokens[:, -1] = END
    embeds = functional.normalize(torch.randn(2, COUNT, D, generator=random), dim=2).half()
    return {"position": torch.arange(COUNT) * 7, "tokens": tokens, "image_embed": embeds[0], "text_embed": embeds[1]}


def streams(batch: Batch) -> SampleGenerator:
    return SampleGenerator.for_samples(3, batch["position"])


@pytest.fixture
def basis(tmp_path: Path) -> str:
    """File with the principal components of that batch."""
    seen = EmbeddingStatistics(D)
    seen.update(make_batch()["image_embed"].numpy())
    path = str(tmp_path / "pca.safetensors")
    PrincipalComponents.fit(seen, clip="a CLIP").save(path)
    return path


def objective_config(pca: str, **changes: Any) -> ARPriorObjectiveConfig:
    model = {"embed_dim": D, "num_components": K, "num_buckets": 16, **SHAPE}
    return ARPriorObjectiveConfig(stage=ARPriorStageConfig.from_dict({"model": model}), pca=pca, **changes)


class Recorded(nn.Module):
    """Calls the network and keeps what it was given and what it answered."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Any:
        self.inputs = inputs
        self.output = self.network(*inputs)
        return self.output


def test_codes_are_those_of_the_fitted_basis(basis: str) -> None:
    """By hand: centred, projected, in deviations, 16 buckets over plus and minus five of them."""
    objective, batch = build(objective_config(basis)), make_batch()
    network = Recorded(objective.model)
    objective.loss(network, batch, streams(batch))
    dots, codes, _ = network.inputs
    z_i, z_t = (batch[name].double().numpy() for name in ("image_embed", "text_embed"))
    values, vectors = np.linalg.eigh(np.cov(z_i.T, bias=True))
    scores = (z_i - z_i.mean(axis=0)) @ vectors[:, ::-1][:, :K] / np.sqrt(values[::-1][:K])
    expected = np.floor((scores + 5) / 10 * 16)
    agrees = (codes.numpy() == expected).all(axis=0) | (codes.numpy() == np.floor((5 - scores) / 10 * 16)).all(axis=0)
    assert agrees.all()  # a direction's sign is free
    assert dots.tolist() == np.floor(((z_i * z_t).sum(axis=1) + 1) / 2 * 16).tolist()


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_every_token_counts_the_same_but_dropped_ones_not_at_all(basis: str, drop: float) -> None:
    objective, batch = build(objective_config(basis, text_drop_prob=drop)), make_batch()
    network = Recorded(objective.model)
    output = objective.loss(network, batch, streams(batch))
    dots, codes, cond = network.inputs
    expected = []
    for row in range(COUNT):
        dot_loss = functional.cross_entropy(network.output[0][row], dots[row])
        code_loss = functional.cross_entropy(network.output[1][row], codes[row], reduction="sum")
        expected.append((code_loss + (0 if cond.text_dropped[row] else dot_loss)) / (K + 1))
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())
    assert cond.text_dropped.float().mean().item() in (
        [drop] if drop in (0, 1) else [n / COUNT for n in range(1, COUNT)]
    )


def depends(config: ARPriorObjectiveConfig, name: str) -> bool:
    """Whether the loss changes when another sample's `name` is put in."""
    objective, batch = build(config), make_batch()
    changed = batch | {name: batch[name].roll(1, dims=0)}
    losses = [objective.loss(objective.model, given, streams(given)).loss for given in (batch, changed)]
    return not torch.equal(*losses)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_dropped_text_has_no_way_in(basis: str, drop: float) -> None:
    """Not even through its dot product with the image embedding."""
    config = objective_config(basis, text_drop_prob=drop)
    assert depends(config, "tokens") == depends(config, "text_embed") == (drop == 0.0)
    objective, batch = build(config), make_batch()
    before = {key: value.clone() for key, value in batch.items()}
    objective.loss(objective.model, batch, streams(batch)).loss.backward()
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_a_loss_is_the_mean_of_its_samples_losses(basis: str) -> None:
    objective, batch = build(objective_config(basis, text_drop_prob=0.5)), make_batch()
    whole = objective.loss(objective.model, batch, streams(batch))
    singles = []
    for index in range(COUNT):
        single = {key: value[index : index + 1] for key, value in batch.items()}
        singles.append(objective.loss(objective.model, single, streams(single)))
    torch.testing.assert_close(whole.loss, torch.stack([single.loss for single in singles]).mean())
    for key, value in whole.metrics.items():
        torch.testing.assert_close(value, torch.stack([single.metrics[key] for single in singles]).mean())


def test_a_few_captions_are_learned_by_heart(basis: str) -> None:
    """Sampling then gives each caption its own image embedding: nearer than text is to it, and than other captions' are."""
    torch.manual_seed(0)
    config = objective_config(basis).model_copy(update={"text_drop_prob": 0.0})
    objective, batch = config.build(), make_batch()
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = objective.loss(objective.model, batch, streams(batch)).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model = objective.model.eval()
    assert isinstance(model, ARPriorModel)
    z_i, z_t = batch["image_embed"].float(), batch["text_embed"].float()
    stage = config.stage.stage(model)
    sampling = config.stage.sampling.merged({"temperature": 0.1})
    cond = PriorCondition(z_t, batch["tokens"].long(), batch["tokens"] > 0, torch.zeros(COUNT, dtype=torch.bool))
    codes = model.codec.encode(z_i)
    assert torch.equal(draw_codes(model, cond, streams(batch), sampling), codes)
    found = stage.sample(z_t, cond.tokens, streams(batch), sampling=sampling)
    torch.testing.assert_close(found, functional.normalize(model.codec.decode(codes), dim=1))
    to_true, to_text = (found * z_i).sum(dim=1), (z_i * z_t).sum(dim=1)
    assert (to_true > to_text).all()
    assert (to_true > (found * z_i.roll(1, dims=0)).sum(dim=1)).all()


def test_a_run_takes_the_first_components_of_its_file(basis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(basis).parent)
    config = objective_config("pca.safetensors").merged({"stage": {"model": {"num_components": 2}}})
    fitted = config.with_embeddings(D, None)
    assert fitted.pca == basis  # workers may be in other folders
    model = fitted.build().model
    assert isinstance(model, ARPriorModel)
    every = PrincipalComponents.load(basis)
    assert every.num_components == D
    torch.testing.assert_close(model.codec.components, torch.from_numpy(every.components[:2]).float())


def test_what_does_not_fit_is_refused(basis: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.pca: required.*jobs/embed\.py"):
        objective_config("").with_embeddings(D, None)
    with pytest.raises(DataError, match="does not exist"):
        objective_config(str(tmp_path / "none")).with_embeddings(D, None)
    with pytest.raises(ConfigError, match=r"objective\.stage\.model\.embed_dim = 6.*set it to 7"):
        objective_config(basis).with_embeddings(7, None)
    other = EmbeddingStatistics(3)
    other.update(np.random.default_rng(0).standard_normal((9, 3)))
    PrincipalComponents.fit(other, clip="a CLIP").save(basis)
    with pytest.raises(ConfigError, match="is of embeddings of 3 numbers, those of this run have 6"):
        objective_config(basis).with_embeddings(D, None)


def test_more_components_than_there_are_are_refused(basis: str) -> None:
    few = EmbeddingStatistics(D)
    few.update(make_batch()["image_embed"].numpy()[:5])
    PrincipalComponents.fit(few, clip="a CLIP").save(basis)
    config = objective_config(basis).merged({"stage": {"model": {"num_components": 5}}})
    with pytest.raises(DataError, match="num_components = 5: the embeddings of 6 numbers vary in 4 directions"):
        config.with_embeddings(D, None)


def test_components_of_another_clip_of_the_same_width_are_refused(basis: str) -> None:
    config = objective_config(basis)
    config.check_clip("a CLIP")
    with pytest.raises(
        ConfigError, match=r"objective\.pca = .*by the CLIP of fingerprint a CLIP, those of .* by another"
    ):
        config.check_clip("another")


def test_the_paper_recipe_has_the_papers_numbers() -> None:
    """Table 3, the autoregressive prior's column, and section 2.2."""
    config = paper()
    model, optimizer, loop = config.objective.stage_config().model, config.optimizer, config.loop  # type: ignore[union-attr]
    assert (model.context_length, model.width, model.depth, model.heads) == (256, 2048, 24, 32)
    assert (model.embed_dim, model.num_components, model.num_buckets) == (1024, 319, 1024)
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.eps) == (1.6e-4, 0.9, 0.91, 1e-10)
    assert (optimizer.weight_decay, optimizer.ema_decay, optimizer.ema_warmup) == (4e-2, 0.999, False)
    assert (loop.global_batch_size, loop.max_steps) == (4096, 1_000_000)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model.build().parameters())
    blocks = 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048
    tables = (49408 + 577 - 1 + 2 * 1024) * 2048 + 4 * 2048 + 1024 * 2048 + 2 * (1024 * 2048 + 1024)
    assert parameters == pytest.approx(blocks + tables, rel=1e-4)
