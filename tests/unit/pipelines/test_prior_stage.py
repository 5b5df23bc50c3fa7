"""The two kinds of prior stage: how they draw, and that a bundle and its users do not have to know which it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from unclip.config.base import ConfigError
from unclip.models.ar_prior import ARPriorModel
from unclip.models.prior import PriorCondition, PriorModel
from unclip.pipelines.bundle import Bundle, ClipReference, save_stage
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import (
    AnyPriorStageConfig,
    ARPriorStageConfig,
    ARSamplingConfig,
    PriorStageConfig,
    stage_config_from_dict,
)
from unclip.pipelines.stages.ar_prior import draw_code, draw_codes
from unclip.utils.random import SampleGenerator

START, END = 49406, 49407
TOKENS = torch.tensor([[START, 320, 736, END] + [0] * 4, [START, END] + [0] * 6, [START, 9, END] + [0] * 5])
TEXT_EMBED = functional.normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), dim=1)
SHAPE = {"embed_dim": 6, "context_length": 8, "width": 16, "depth": 2, "heads": 2}

DIFFUSION = {
    "kind": "prior",
    "model": SHAPE,
    "diffusion": {"prediction_type": "sample", "num_train_timesteps": 50},
    "sampling": {"num_inference_steps": 4, "guidance_scale": 2.0},
    "normalizer": {"std": 0.3},
}
AUTOREGRESSIVE = {
    "kind": "prior",
    "prior_type": "autoregressive",
    "model": SHAPE | {"num_components": 5, "num_buckets": 16},
    "sampling": {"guidance_scale": 2.0},
}
KINDS = pytest.mark.parametrize("data", [DIFFUSION, AUTOREGRESSIVE], ids=["diffusion", "autoregressive"])


def config_of(data: dict[str, Any], **changes: Any) -> AnyPriorStageConfig:
    config = stage_config_from_dict({**data, **changes})
    assert isinstance(config, PriorStageConfig | ARPriorStageConfig)
    return config


def network(config: AnyPriorStageConfig) -> nn.Module:
    """With weights that are nowhere zero."""
    torch.manual_seed(0)
    model = config.build().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def streams(rows: list[int] = [3, 4, 5]) -> SampleGenerator:  # noqa: B006  only read
    return SampleGenerator.for_samples(0, torch.tensor(rows))


def sample(
    config: AnyPriorStageConfig, rows: list[int], model: nn.Module | None = None, **changes: Any
) -> torch.Tensor:
    stage = config.stage(model or network(config))
    sampling = config.sampling.merged(changes)
    generator = streams([3 + row for row in rows])
    return stage.sample(TEXT_EMBED[rows], TOKENS[rows], generator, sampling=sampling)  # type: ignore[arg-type]


@KINDS
def test_a_caption_does_not_depend_on_its_batch(data: dict[str, Any]) -> None:
    config = config_of(data)
    together = sample(config, [0, 1, 2])
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    for row in range(3):
        torch.testing.assert_close(sample(config, [row])[0], together[row], rtol=1e-4, atol=1e-5)


@KINDS
def test_seed_and_caption_both_matter(data: dict[str, Any]) -> None:
    config = config_of(data)
    stage = config.stage(network(config))
    for tokens, text_embed, rows in (
        (TOKENS, TEXT_EMBED, [6, 7, 8]),
        (TOKENS.flip(0), TEXT_EMBED, [3, 4, 5]),
        (TOKENS, TEXT_EMBED.flip(0), [3, 4, 5]),
    ):
        other = stage.sample(text_embed, tokens, streams(rows), sampling=config.sampling)  # type: ignore[arg-type]
        assert (other - sample(config, [0, 1, 2])).abs().amax(dim=1)[0] > 1e-3


@KINDS
def test_of_more_draws_the_nearest_is_kept(data: dict[str, Any]) -> None:
    """The first draw is the same however many there are, so more of them can only be nearer."""
    similarity = [(sample(config_of(data, num_draws=draws), [0, 1, 2]) * TEXT_EMBED).sum(dim=1) for draws in (1, 2, 16)]
    assert (similarity[1] >= similarity[0] - 1e-5).all()
    assert (similarity[2] >= similarity[1] - 1e-5).all()
    assert (similarity[2] > similarity[0] + 1e-3).all()


@KINDS
def test_a_bundle_holds_either_kind(data: dict[str, Any], tmp_path: Path) -> None:
    config, uri = config_of(data), str(tmp_path / "bundle")
    model = network(config)
    if isinstance(model, ARPriorModel):
        model.codec.mean.add_(0.1)
    clip = ClipReference(source="clip", fingerprint="f")
    save_stage(uri, config, tensors=model.state_dict(), clip=clip, provenance={})
    bundle = Bundle.load(uri)
    assert bundle.configs == {"prior": config}
    loaded = bundle.load_model("prior")
    torch.testing.assert_close(sample(config, [0, 1, 2], loaded), sample(config, [0, 1, 2], model))


def test_a_stage_without_a_type_is_a_diffusion_prior_and_others_are_refused() -> None:
    assert isinstance(config_of(DIFFUSION), PriorStageConfig)
    assert isinstance(config_of(AUTOREGRESSIVE), ARPriorStageConfig)
    assert json.loads(config_of(AUTOREGRESSIVE).to_json())["prior_type"] == "autoregressive"
    with pytest.raises(ConfigError, match="prior_type = 'guessing'"):
        config_of(DIFFUSION, prior_type="guessing")


# --- diffusion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_prepared_sampling_is_sampling(guidance_scale: float) -> None:
    """The same embeddings as each draw by itself, from conditions that nothing was computed of."""
    config = config_of(DIFFUSION)
    assert isinstance(config, PriorStageConfig)
    model = network(config)
    sampling = config.sampling.merged({"guidance_scale": guidance_scale})
    cond = PriorCondition(
        text_embed=TEXT_EMBED,
        tokens=TOKENS,
        text_mask=torch.arange(8) <= TOKENS.argmax(dim=1, keepdim=True),
        text_dropped=torch.zeros(3, dtype=torch.bool),
    )
    draws = []
    for index in range(2):
        generator = streams().child(f"draw {index}")
        x_T = generator.normal((6,))
        normalized = sampling.sample(model, x_T, config.diffusion.build(), generator, cond)
        draws.append(functional.normalize(normalized * 0.3, dim=1))
    nearer = (draws[1] * TEXT_EMBED).sum(dim=1) > (draws[0] * TEXT_EMBED).sum(dim=1)
    expected = torch.where(nearer[:, None], draws[1], draws[0])
    found = sample(config, [0, 1, 2], model, guidance_scale=guidance_scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, 3), (2.0, 4)])
def test_captions_pass_the_network_once_for_all_draws_and_steps(guidance_scale: float, rows: int) -> None:
    """And with guidance one row more, which stands for all that are without text."""
    config = config_of(DIFFUSION, num_draws=5)
    model, seen = network(config), []
    assert isinstance(model, PriorModel)
    model.prefix.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    sample(config, [0, 1, 2], model, guidance_scale=guidance_scale)
    assert seen == [rows]


# --- autoregressive ---------------------------------------------------------------------------------------------------


def test_codes_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.4, 0.3, 0.2])
    uniform = (torch.arange(1000) + 0.5) / 1000
    codes = draw_code(probabilities.log().expand(1000, 5), uniform)
    torch.testing.assert_close(codes.bincount(minlength=5) / 1000, probabilities, atol=1e-6, rtol=0)
    edges = draw_code(torch.zeros(3, 4), torch.tensor([0.0, 0.25, 1 - 2**-24]))
    assert edges.tolist() == [0, 1, 3]


class Fixed(ARPriorModel):
    """Asks for codes with logits of its own, the same in every row."""

    logits: torch.Tensor

    def generate(self, cond: PriorCondition, choose: Any) -> torch.Tensor:
        self.chosen = [choose(index, self.logits.expand(cond.batch_size, -1)) for index in range(6)]
        return torch.stack(self.chosen[1:], dim=1)


def drawn(sampling: ARSamplingConfig, rows: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies of the dot product's codes and of the others, of probabilities 0.2, 0.1, 0.4 and 0.3."""
    config = config_of(AUTOREGRESSIVE)
    assert isinstance(config, ARPriorStageConfig)
    model = Fixed(config.model.merged({"num_buckets": 4}))
    model.logits = torch.tensor([0.2, 0.1, 0.4, 0.3]).log()
    kept = torch.zeros(rows, dtype=torch.bool)
    tokens = TOKENS[:1].expand(rows, -1)
    cond = PriorCondition(TEXT_EMBED[:1].expand(rows, -1), tokens, tokens > 0, kept)
    codes = draw_codes(model, cond, SampleGenerator.for_samples(0, torch.arange(rows)), sampling)
    assert codes.shape == (rows, 5)
    return model.chosen[0][-rows:].bincount(minlength=4) / rows, codes.flatten().bincount(minlength=4) / codes.numel()


def test_the_dot_product_is_drawn_from_the_upper_half_of_its_distribution() -> None:
    """Of 0.2, 0.1, 0.4, 0.3 the upper half is 0.2 of the third and 0.3 of the fourth; the codes are not touched."""
    dots, codes = drawn(ARSamplingConfig())
    torch.testing.assert_close(dots, torch.tensor([0, 0, 0.4, 0.6]), atol=0.03, rtol=0)
    assert not dots[:2].any()
    torch.testing.assert_close(codes, torch.tensor([0.2, 0.1, 0.4, 0.3]), atol=0.02, rtol=0)
    dots, _ = drawn(ARSamplingConfig(dot_percentile=0.0))
    torch.testing.assert_close(dots, torch.tensor([0.2, 0.1, 0.4, 0.3]), atol=0.03, rtol=0)


def test_temperature_sharpens_the_codes_alone() -> None:
    dots, codes = drawn(ARSamplingConfig(temperature=0.5))
    squared = torch.tensor([0.04, 0.01, 0.16, 0.09])
    torch.testing.assert_close(codes, squared / squared.sum(), atol=0.02, rtol=0)
    torch.testing.assert_close(dots, torch.tensor([0, 0, 0.4, 0.6]), atol=0.03, rtol=0)


def test_without_guidance_there_is_one_branch_and_with_none_of_the_text_the_other() -> None:
    config = config_of(AUTOREGRESSIVE)
    assert isinstance(config, ARPriorStageConfig)
    model = network(config)
    assert isinstance(model, ARPriorModel)

    def codes(scale: float, text_embed: torch.Tensor, *, dropped: bool = False) -> torch.Tensor:
        cond = PriorCondition(text_embed, TOKENS, TOKENS > 0, torch.full((3,), dropped))
        return draw_codes(model, cond, streams(), ARSamplingConfig(guidance_scale=scale))

    assert torch.equal(codes(0.0, TEXT_EMBED), codes(1.0, TEXT_EMBED, dropped=True))
    assert torch.equal(codes(0.0, TEXT_EMBED), codes(0.0, -TEXT_EMBED))
    assert not torch.equal(codes(1.0, TEXT_EMBED), codes(1.0, -TEXT_EMBED))
    assert torch.equal(codes(1.0 + 1e-9, TEXT_EMBED), codes(1.0, TEXT_EMBED))
    assert not torch.equal(codes(3.0, TEXT_EMBED), codes(1.0, TEXT_EMBED))


def test_progress_counts_the_codes_and_the_dot_product() -> None:
    config, reports = config_of(AUTOREGRESSIVE), []
    assert isinstance(config, ARPriorStageConfig)
    stage = config.stage(network(config))
    stage.sample(
        TEXT_EMBED,
        TOKENS,
        streams(),
        sampling=config.sampling,
        progress=lambda done, steps: reports.append((done, steps)),
    )
    assert reports == [(done, 6) for done in range(1, 7)]


def test_the_cascade_takes_either_kind(tiny_bundle: str, tmp_path: Path) -> None:
    """An autoregressive prior put into a bundle is the one that pictures are made with."""
    uri = shutil.copytree(tiny_bundle, tmp_path / "bundle").as_posix()
    shape = {**SHAPE, "embed_dim": 8, "context_length": 16, "num_components": 5, "num_buckets": 16}
    config = config_of(AUTOREGRESSIVE, model=shape)
    model = network(config)
    save_stage(uri, config, tensors=model.state_dict(), clip=Bundle.load(uri).clip, provenance={})
    pipeline = Pipeline.from_bundle(uri)
    output = pipeline(["a red circle", "a blue heart"], [7, 8])
    text_embed = pipeline.clip.encode_text(pipeline.clip.tokenize(["a red circle", "a blue heart"]))
    assert isinstance(model, ARPriorModel)
    basis = torch.cat([model.codec.components, model.codec.mean[None]])
    outside = output.image_embed - output.image_embed @ torch.linalg.pinv(basis) @ basis
    torch.testing.assert_close(outside, torch.zeros_like(outside), atol=1e-5, rtol=0)
    assert (text_embed - text_embed @ torch.linalg.pinv(basis) @ basis).norm(dim=1).min() > 0.1
    assert set(output.images) == {16, 32, 64}
