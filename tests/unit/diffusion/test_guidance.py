"""Classifier-free guidance on a denoiser whose outputs are known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from unclip.diffusion.guidance import classifier_free


@dataclass(frozen=True)
class Labels:
    """(B,) labels; 0 is no label."""

    values: torch.Tensor

    def unconditional(self) -> Labels:
        return Labels(torch.zeros_like(self.values))

    def cat(self, other: Labels) -> Labels:
        return Labels(torch.cat([self.values, other.values]))


class Denoiser:
    """Output depends on picture, timestep and label, in each of `channels` in its own way; counts its passes."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.passes = 0

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        assert x_t.shape[0] == timesteps.shape[0] == cond.values.shape[0]
        self.passes += 1
        shape = (-1, 1, 1, 1)
        frequency = torch.arange(1, self.channels + 1, dtype=x_t.dtype).reshape(1, -1, 1, 1)
        phase = x_t.sum(dim=1, keepdim=True) + timesteps.reshape(shape) / 7 + 2 * cond.values.reshape(shape)
        return torch.sin(frequency * phase)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, Labels]:
    x_t = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x_t, torch.tensor([5, 40, 900]), Labels(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))


def test_a_scale_extrapolates_in_one_pass(inputs) -> None:
    x_t, timesteps, cond = inputs
    denoise = Denoiser(3)
    guided = classifier_free(denoise, 3.0, learned_variance=False)(x_t, timesteps, cond)
    assert denoise.passes == 1
    conditional, uncond = denoise(x_t, timesteps, cond), denoise(x_t, timesteps, cond.unconditional())
    torch.testing.assert_close(guided, 3 * conditional - 2 * uncond)


@pytest.mark.parametrize("learned_variance", [True, False])
def test_scale_1_is_conditional_and_scale_0_is_not(inputs, learned_variance) -> None:
    x_t, timesteps, cond = inputs
    denoise = Denoiser(6)
    one, zero = (
        classifier_free(denoise, scale, learned_variance=learned_variance)(x_t, timesteps, cond) for scale in (1.0, 0.0)
    )
    torch.testing.assert_close(one, denoise(x_t, timesteps, cond))
    channels = 3 if learned_variance else 6
    torch.testing.assert_close(zero[:, :channels], denoise(x_t, timesteps, cond.unconditional())[:, :channels])


def test_learned_variance_is_that_of_the_conditional_pass(inputs) -> None:
    x_t, timesteps, cond = inputs
    denoise = Denoiser(6)
    guided = classifier_free(denoise, 4.0, learned_variance=True)(x_t, timesteps, cond)
    conditional, uncond = denoise(x_t, timesteps, cond), denoise(x_t, timesteps, cond.unconditional())
    torch.testing.assert_close(guided[:, :3], uncond[:, :3] + 4 * (conditional - uncond)[:, :3])
    torch.testing.assert_close(guided[:, 3:], conditional[:, 3:])


def test_a_scale_for_each_sample(inputs) -> None:
    x_t, timesteps, cond = inputs
    scales = [1.0, 2.5, 8.0]
    together = classifier_free(Denoiser(3), torch.tensor(scales), learned_variance=False)(x_t, timesteps, cond)
    for i, scale in enumerate(scales):
        row = slice(i, i + 1)
        guided = classifier_free(Denoiser(3), scale, learned_variance=False)
        torch.testing.assert_close(together[row], guided(x_t[row], timesteps[row], Labels(cond.values[row])))


def test_scales_for_another_batch_are_refused(inputs) -> None:
    guided = classifier_free(Denoiser(3), torch.ones(2), learned_variance=False)
    with pytest.raises(ValueError, match=r"one for each of 3 samples, not a tensor of shape \(2,\)"):
        guided(*inputs)
