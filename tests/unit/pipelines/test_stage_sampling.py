from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.stages import DecoderStage, DecoderStageConfig, PriorStage, UpsamplerStage
from unclip.pipelines.stages.upsampler import low_res_condition
from unclip.utils.random import SampleGenerator

START, END = 49406, 49407
TOKENS = torch.tensor([[START, 320, 736, END] + [0] * 12, [START, END] + [0] * 14])


class Echo(nn.Module):
    """A network that answers with what it was given, so that one step yields the noise itself; keeps the condition."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.channels = channels

    def prepare(self, cond: Any) -> Any:
        return cond

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        self.cond = cond
        return torch.cat([x_t] * self.channels, dim=1)


def streams() -> SampleGenerator:
    return SampleGenerator.for_samples(0, torch.tensor([3, 4]))


@pytest.fixture
def one_step_prior(tiny_configs: Mapping[str, Any]) -> PriorStage:
    """A prior whose draws are known: the noise of each draw, denormalised."""
    changes = {
        "sampling": {"sampler": "ddim", "num_inference_steps": 1, "guidance_scale": 1.0},
        "normalizer": {"mean": [0.1 * i for i in range(8)], "std": 0.5},
    }
    return PriorStage(tiny_configs["prior"].merged(changes), Echo())


def test_the_prior_keeps_the_draw_nearer_the_text(one_step_prior: PriorStage) -> None:
    config = one_step_prior.config
    draws = [streams().child(f"draw {n}").normal((8,)) * 0.5 + torch.tensor(config.normalizer.mean) for n in range(2)]
    draws = [functional.normalize(draw, dim=1) for draw in draws]
    # The first caption means what its second draw is, the second caption what its first draw is.
    text_embed = torch.stack([draws[1][0], draws[0][1]])
    kept = one_step_prior.sample(text_embed, TOKENS, streams(), sampling=config.sampling)
    torch.testing.assert_close(kept, text_embed)
    kept = one_step_prior.sample(text_embed.flip(0), TOKENS, streams(), sampling=config.sampling)
    similarity = torch.stack([(draw * text_embed.flip(0)).sum(dim=1) for draw in draws])
    torch.testing.assert_close((kept * text_embed.flip(0)).sum(dim=1), similarity.amax(dim=0))


def test_the_prior_tells_its_network_the_caption(one_step_prior: PriorStage) -> None:
    text_embed = functional.normalize(torch.randn(2, 8), dim=1)
    network = Echo()
    stage = PriorStage(one_step_prior.config, network)
    stage.sample(text_embed, TOKENS, streams(), sampling=stage.config.sampling)
    cond = network.cond
    torch.testing.assert_close(cond.text_embed, text_embed.repeat(2, 1))
    assert torch.equal(cond.tokens, TOKENS.repeat(2, 1))
    assert cond.text_mask.sum(dim=1).tolist() == [4, 2, 4, 2]
    assert not cond.text_dropped.any()


def test_the_decoder_tells_its_network_embedding_and_caption(tiny_configs: Mapping[str, Any]) -> None:
    config = tiny_configs["decoder"].merged({"normalizer": {"mean": 0.2, "std": 0.5}})
    network = Echo(channels=2)
    stage = DecoderStage(config, network)
    image_embed = functional.normalize(torch.randn(2, 8), dim=1)
    sampling = config.sampling.merged({"guidance_scale": 1.0})
    pictures = stage.sample(image_embed, TOKENS, streams(), sampling=sampling)
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.abs().max() <= 1
    torch.testing.assert_close(network.cond.image.embed, (image_embed - 0.2) / 0.5)
    assert torch.equal(network.cond.text.tokens, TOKENS)
    assert network.cond.text.mask.sum(dim=1).tolist() == [4, 2]
    assert not network.cond.image.dropped.any()
    assert not network.cond.text.dropped.any()


GLIDE = {"model": {"embed_dim": None}}
STATES = {"model": {"text": None, "text_states": {"context_length": 16, "state_dim": 5, "width": 8}}}
ADM = {
    "model": {"embed_dim": None, "text": None, "num_classes": 3},
    "label_column": "kind",
    "classes": ["cat", "dog", "owl"],
}
INPAINTING = {"model": {"inpainting": True, "unet": {"in_channels": 7}}}


def sample_decoder(config: DecoderStageConfig, model: nn.Module, **changes: Any) -> torch.Tensor:
    """Pictures for whatever the decoder of `config` is told; all of it random, but the same each time."""
    random, wanted = torch.Generator().manual_seed(0), config.model.inputs
    image_embed = functional.normalize(torch.randn(2, 8, generator=random), dim=1)
    further = {
        "text_states": torch.randn(2, 16, 5, generator=random),
        "label": torch.tensor([2, 0]),
        "known": torch.rand(2, 3, 16, 16, generator=random) * 2 - 1,
        "known_mask": torch.ones(2, 1, 16, 16),
    }
    further = {name: tensor for name, tensor in (further | changes).items() if name in wanted and tensor is not None}
    return DecoderStage(config, model).sample(
        image_embed if "image_embed" in wanted else None,
        TOKENS if "tokens" in wanted else None,
        streams(),
        sampling=config.sampling,
        further=further,
    )


def randomized(config: DecoderStageConfig) -> nn.Module:
    torch.manual_seed(0)
    model = config.build().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "changes", [{}, GLIDE, STATES, ADM, INPAINTING], ids=["unclip", "glide", "states", "adm", "known"]
)
def test_decoders_of_every_kind_sample(tiny_configs: Mapping[str, Any], changes: dict[str, Any]) -> None:
    config = tiny_configs["decoder"].merged(changes)
    pictures = sample_decoder(config, randomized(config))
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.std() > 0.05


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [(STATES, "text_states", torch.zeros(2, 16, 5)), (ADM, "label", torch.tensor([1, 1])), (INPAINTING, "known", None)],
)
def test_what_a_decoder_is_told_changes_its_pictures(
    tiny_configs: Mapping[str, Any], changes: dict[str, Any], name: str, value: torch.Tensor | None
) -> None:
    config = tiny_configs["decoder"].merged(changes)
    model = randomized(config)
    difference = sample_decoder(config, model) - sample_decoder(config, model, **{name: value})
    assert difference.abs().flatten(1).amax(dim=1).min() > 1e-3


def test_an_inpainting_decoder_draws_from_nothing_where_nothing_is_known(tiny_configs: Mapping[str, Any]) -> None:
    config = tiny_configs["decoder"].merged(INPAINTING)
    model = randomized(config)
    without = sample_decoder(config, model, known=None, known_mask=None)
    torch.testing.assert_close(without, sample_decoder(config, model, known_mask=torch.zeros(2, 1, 16, 16)))


def test_a_guide_wraps_the_guided_network(tiny_configs: Mapping[str, Any]) -> None:
    """It sees the batch as it is, not doubled, and what it answers is what is sampled from."""
    config, seen = tiny_configs["decoder"], []

    def guide(denoise: Any) -> Any:
        def guided(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
            seen.append(len(x_t))
            return torch.full_like(denoise(x_t, timesteps, cond), 0.25)

        return guided

    stage = DecoderStage(config.merged({"diffusion": {"prediction_type": "sample"}}), randomized(config))
    sampling = config.sampling.merged({"sampler": "ddim"})
    image_embed = functional.normalize(torch.randn(2, 8), dim=1)
    pictures = stage.sample(image_embed, TOKENS, streams(), sampling=sampling, guide=guide)
    assert seen == [2] * sampling.num_inference_steps
    torch.testing.assert_close(pictures, torch.full((2, 3, 16, 16), 0.25))


@pytest.mark.parametrize("changes", [{}, GLIDE, ADM], ids=["unclip", "glide", "adm"])
def test_a_picture_does_not_depend_on_its_batch(tiny_configs: Mapping[str, Any], changes: dict[str, Any]) -> None:
    config = tiny_configs["decoder"].merged(changes)
    stage, wanted = DecoderStage(config, randomized(config)), config.model.inputs
    image_embed, label = functional.normalize(torch.randn(2, 8), dim=1), torch.tensor([2, 0])

    def sample(rows: list[int]) -> torch.Tensor:
        return stage.sample(
            image_embed[rows] if "image_embed" in wanted else None,
            TOKENS[rows] if "tokens" in wanted else None,
            SampleGenerator(streams().keys[rows]),
            sampling=config.sampling,
            further={"label": label[rows]} if "label" in wanted else {},
        )

    torch.testing.assert_close(sample([0, 1]), torch.cat([sample([0]), sample([1])]), rtol=1e-4, atol=1e-4)


def test_inputs_that_are_missing_or_unknown_are_named(tiny_configs: Mapping[str, Any]) -> None:
    config = tiny_configs["decoder"]
    with pytest.raises(ValueError, match="image_embed is missing: this decoder is told image_embed, tokens"):
        DecoderStage(config, Echo()).sample(None, TOKENS, streams(), sampling=config.sampling)
    config = config.merged(ADM)
    for label in (-1, 3):
        with pytest.raises(ValueError, match=rf"label = \[0, {label}\]: each must be from 0 to 2"):
            sample_decoder(config, Echo(), label=torch.tensor([0, label]))


def test_embeddings_and_pictures_of_another_scale_are_refused(
    tiny_configs: Mapping[str, Any], one_step_prior: PriorStage
) -> None:
    """CLIP's raw vectors have norms around 10, pictures come in [0, 255] and [-3, 1]: all would be sampled from in silence."""
    unit = functional.normalize(torch.randn(2, 8), dim=1)
    decoder = tiny_configs["decoder"]
    DecoderStage(decoder, Echo(2)).sample(unit.half(), TOKENS, streams(), sampling=decoder.sampling)
    for wrong in (10 * unit, unit * torch.tensor([[1.0], [0.9]]), unit * math.nan):
        with pytest.raises(ValueError, match="image_embed must be of unit norm, but has norms from"):
            DecoderStage(decoder, Echo(2)).sample(wrong, TOKENS, streams(), sampling=decoder.sampling)
        with pytest.raises(ValueError, match="text_embed must be of unit norm, but has norms from"):
            one_step_prior.sample(wrong, TOKENS, streams(), sampling=one_step_prior.config.sampling)
    upsampler = tiny_configs["upsampler_256"]
    for low, high in ((0, 255), (-3, 1)):
        low_res = torch.linspace(low, high, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
        with pytest.raises(ValueError, match=rf"low_res must be in \[-1, 1\], but is in \[{low}, {high}\]"):
            UpsamplerStage(upsampler, Echo()).sample(low_res, streams(), sampling=upsampler.sampling)
        with pytest.raises(ValueError, match=r"known must be in \[-1, 1\]"):
            sample_decoder(decoder.merged(INPAINTING), Echo(2), known=low_res)


# --- upsamplers -------------------------------------------------------------------------------------------------------


def make_process() -> DiffusionProcess:
    return DiffusionConfig(num_train_timesteps=50).build()


def test_a_low_res_condition_is_its_8_bits_between_pixel_centres() -> None:
    """Golden: four grey values, off the 8-bit grid by less than half of it, at twice the size."""
    row = torch.tensor([0.0, 64.0, 128.0, 255.0]) / 127.5 - 1
    low_res = row.expand(1, 3, 4, 4) + 0.3 / 127.5
    cond = low_res_condition(low_res, 8, make_process(), noise_level=None, generator=streams(), resize="bilinear")
    expected = torch.tensor([0, 16, 48, 80, 112, 159.75, 223.25, 255]) / 127.5 - 1
    torch.testing.assert_close(cond.low_res, expected.expand(1, 3, 8, 8))
    assert cond.noise_level is None


def test_the_low_res_conditions_noise_is_the_processs_at_its_level() -> None:
    process, level = make_process(), torch.tensor([10, 40])
    low_res = to_signed(torch.full((2, 32, 32, 3), 200, dtype=torch.uint8))
    cond = low_res_condition(low_res, 32, process, noise_level=level, generator=streams(), resize="bilinear")
    abar = process.alphas_cumprod(level).float()
    torch.testing.assert_close(cond.low_res.mean(dim=(1, 2, 3)), abar.sqrt() * low_res[0, 0, 0, 0], rtol=0, atol=0.08)
    torch.testing.assert_close(cond.low_res.var(dim=(1, 2, 3)), 1 - abar, rtol=0.1, atol=0)
    assert cond.noise_level is level
    single = low_res_condition(
        low_res[1:],
        32,
        process,
        noise_level=level[1:],
        generator=SampleGenerator(streams().keys[1:]),
        resize="bilinear",
    )
    torch.testing.assert_close(single.low_res, cond.low_res[1:])


@pytest.mark.parametrize("level", [0, 30])
def test_the_upsampler_samples_at_its_noise_level(tiny_configs: Mapping[str, Any], level: int) -> None:
    config = tiny_configs["upsampler_256"].merged({"model": {"noise_conditioning": True}, "low_res_noise_level": level})
    network = Echo()
    low_res = torch.rand(2, 3, 16, 16) * 2 - 1
    pictures = UpsamplerStage(config, network).sample(low_res, streams(), sampling=config.sampling)
    assert pictures.shape == (2, 3, 32, 32)
    assert network.cond.noise_level.tolist() == [level, level]
    plain = low_res_condition(
        low_res, 32, make_process(), noise_level=None, generator=streams(), resize="bilinear"
    ).low_res
    assert (network.cond.low_res - plain).std() == pytest.approx(0.0 if level == 0 else 0.5, abs=0.3 if level else 0.1)


def test_the_upsampler_tells_its_network_the_small_picture(tiny_configs: Mapping[str, Any]) -> None:
    config, network = tiny_configs["upsampler_256"], Echo()
    low_res = torch.rand(2, 3, 16, 16) * 2 - 1
    UpsamplerStage(config, network).sample(low_res, streams(), sampling=config.sampling)
    expected = low_res_condition(low_res, 32, make_process(), noise_level=None, generator=streams(), resize="bilinear")
    torch.testing.assert_close(network.cond.low_res, expected.low_res)
    assert network.cond.noise_level is None


def test_the_upsampler_wants_its_own_size(tiny_configs: Mapping[str, Any]) -> None:
    config = tiny_configs["upsampler_256"]
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\), not \(2, 3, 8, 8\)"):
        UpsamplerStage(config, Echo()).sample(torch.zeros(2, 3, 8, 8), streams(), sampling=config.sampling)


def test_8_bit_pictures_survive_the_way_to_floats_and_back() -> None:
    pictures = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    signed = to_signed(pictures)
    assert signed.shape == (1, 3, 16, 16)
    assert signed.min() == -1
    assert signed.max() == 1
    assert torch.equal(to_uint8(signed), pictures)
    assert torch.equal(to_uint8(signed + 0.4 / 127.5), pictures)  # to the nearest value, not downwards
    assert to_uint8(torch.full((1, 3, 1, 1), 1.7)).max() == 255
