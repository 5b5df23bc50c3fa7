from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.stages import DecoderStage, PriorStage, UpsamplerStage
from unclip.utils.random import SampleGenerator

START, END = 49406, 49407
TOKENS = torch.tensor([[START, 320, 736, END] + [0] * 12, [START, END] + [0] * 14])


class Echo(nn.Module):
    """A network that answers with what it was given, so that one step yields the noise itself; keeps the condition."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.channels = channels

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
    torch.testing.assert_close(network.cond.image_embed, (image_embed - 0.2) / 0.5)
    assert network.cond.text_mask.sum(dim=1).tolist() == [4, 2]
    assert not network.cond.image_dropped.any()
    assert not network.cond.text_dropped.any()


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
