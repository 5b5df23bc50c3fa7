"""Inversion: with eta 0 the picture comes back, the better the more steps; and x_T is what the closed form says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unclip.config.base import ConfigError
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.inversion import STEPS, deterministic, invert
from unclip.pipelines.pictures import at_size, to_signed
from unclip.pipelines.pipeline import Pipeline


def options(steps: int, scale: float = 1.0) -> GenerationOptions:
    return GenerationOptions().merged(
        {
            "up_to": 16,
            "decoder": {"num_inference_steps": steps, "guidance_scale": scale, "timestep_spacing": "linspace"},
        }
    )


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_pictures_come_back_the_better_the_more_steps(exact_pipeline: Pipeline, drawings, scale: float) -> None:
    small = at_size(torch.from_numpy(drawings), 16).numpy().astype(int)
    errors = []
    for steps in (10, 40, 160):
        latents = invert(exact_pipeline, drawings, options=options(steps, scale))
        draw = exact_pipeline.draw([0, 1, 2], options=deterministic(options(steps, scale)))
        pictures = draw.decode(image_embed=latents.image_embed, x_T=latents.x_T)
        errors.append(np.abs(pictures.numpy().astype(int) - small).mean())
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[2] < 2


def test_the_inversion_is_what_the_flow_of_a_gaussian_says(exact_pipeline: Pipeline, drawings) -> None:
    """The probability flow keeps (x_t - sqrt(abar) mean) / its deviation: at the end that is x_T itself."""
    latents = invert(exact_pipeline, drawings, options=options(1000))
    means = 0.3 * exact_pipeline.decoder._normalizer.normalize(latents.image_embed)[:, :3, None, None]
    x_start = to_signed(at_size(torch.from_numpy(drawings), 16))
    expected = (x_start - means) / 0.1**0.5
    torch.testing.assert_close(latents.x_T, expected, rtol=0.02, atol=0.05)


def test_a_picture_is_inverted_as_alone(exact_pipeline: Pipeline, drawings) -> None:
    together = invert(exact_pipeline, drawings, options=options(5))
    split = invert(exact_pipeline, drawings, options=options(5).merged({"max_pixels": 1}))
    alone = invert(exact_pipeline, drawings[1:2], options=options(5))
    torch.testing.assert_close(split.x_T, together.x_T)
    torch.testing.assert_close(alone.x_T[0], together.x_T[1])
    torch.testing.assert_close(alone.image_embed[0], together.image_embed[1])


def test_only_ddim_comes_back() -> None:
    chosen = deterministic(GenerationOptions())
    assert (chosen.decoder.sampler, chosen.decoder.num_inference_steps) == ("ddim", STEPS)
    assert chosen.decoder.timestep_spacing == "trailing"
    assert deterministic(options(7)).decoder.num_inference_steps == 7
    assert deterministic(options(7)).decoder.timestep_spacing == "linspace"
    assert deterministic(options(7), eta=0.5).decoder.eta == 0.5
    listed = GenerationOptions().merged({"decoder": {"timesteps_list": [40, 5]}})
    assert deterministic(listed).decoder.timesteps_list == (40, 5)
    with pytest.raises(ConfigError, match=r"options.decoder.sampler = 'ddpm': only ddim comes back"):
        deterministic(GenerationOptions().merged({"decoder": {"sampler": "ddpm"}}))


def test_options_that_contradict_the_way_back_are_refused(exact_pipeline: Pipeline, drawings) -> None:
    noisy = options(5).merged({"decoder": {"eta": 0.5}})
    with pytest.raises(ConfigError, match=r"options.decoder.eta = 0.5: the noise of a step is 0 here; leave it null"):
        deterministic(noisy)
    assert deterministic(noisy, eta=0.5) == deterministic(deterministic(noisy, eta=0.5), eta=0.5)
    torch.testing.assert_close(
        invert(exact_pipeline, drawings, options=noisy).x_T, invert(exact_pipeline, drawings, options=options(5)).x_T
    )
    with pytest.raises(ConfigError, match=r"guided by noised_clip, which an inversion does not go through"):
        deterministic(options(5).merged({"decoder": {"clip_guidance_scale": 1.0}}))


def test_pictures_of_no_multiple_are_refused(exact_pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="20x20 pixels cannot be scaled down evenly to 16x16"):
        invert(exact_pipeline, np.zeros((1, 20, 20, 3), dtype=np.uint8), options=options(5))
