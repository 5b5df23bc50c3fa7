"""What the upsamplers learn, by formulas written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.support.objectives import (
    Recorded,
    T,
    Zero,
    build,
    cosine_alphas_cumprod,
    depends,
    make_batch,
    noised,
    pixels,
    streams,
    upsampler,
)

from unclip.training.objectives.upsampler import UpsamplerObjectiveConfig


def test_the_upsampler_learns_noise_given_the_small_picture() -> None:
    objective, batch = build(upsampler()), make_batch(5)
    network = Recorded(objective.model)
    output = objective.loss(network, batch, streams(batch))
    x_t, noise, _ = noised(pixels(batch["image"]), batch)
    torch.testing.assert_close(network.x_t, x_t)
    small = torch.nn.functional.interpolate(pixels(batch["low_res"]), scale_factor=4, mode="bilinear")
    torch.testing.assert_close(network.cond.low_res, small)
    assert network.cond.noise_level is None
    torch.testing.assert_close(output.loss, ((network.output - noise) ** 2).mean())
    assert depends(upsampler(), "low_res")
    assert not depends(upsampler(), "tokens")


def test_noise_conditioning_draws_a_level_for_each_sample() -> None:
    count = 2000
    objective, batch = build(upsampler(noise_conditioning=True)), make_batch(count)
    batch["position"], batch["low_res"] = torch.arange(count), torch.full((count, 2, 2, 3), 128, dtype=torch.uint8)
    network = Recorded(Zero())
    objective.loss(network, batch, streams(batch))
    level = network.cond.noise_level
    assert set(level.tolist()) == set(range(T))
    # It is the level of the noise that is there, and not that of x_t.
    noise = (network.cond.low_res - objective.process.alphas_cumprod(level).sqrt().view(-1, 1, 1, 1) / 255).square()
    expected = 1 - cosine_alphas_cumprod()[level.numpy()]
    # At the corners, the interpolation of 2 x 2 pixels to 8 x 8 takes one pixel alone.
    corners = noise[:, :, ::7, ::7].mean(dim=(1, 2, 3)).numpy()
    assert np.corrcoef(corners, expected)[0, 1] > 0.6
    assert corners.mean() == pytest.approx(expected.mean(), rel=0.05)
    assert abs(np.corrcoef(level.numpy(), network.timesteps.numpy())[0, 1]) < 0.1


def test_the_upsampler_asks_for_crops_with_their_condition() -> None:
    spec = upsampler().batch_spec()
    assert (spec.image_size, spec.crop_size, spec.low_res_size) == (32, 8, 2)
    with pytest.raises(ValueError, match=r"crop_fraction 0\.1 of image_size 32"):
        UpsamplerObjectiveConfig(stage=upsampler().stage, degradation="none", crop_fraction=0.1)
