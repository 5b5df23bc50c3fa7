from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerCondition, UpsamplerConfig, upsample_low_res

UNET = UNetConfig(in_channels=6, channels=8, channel_mult=(1, 2), depth=1, image_size=16)
CONFIG = UpsamplerConfig(unet=UNET)
NOISED = UpsamplerConfig(unet=UNET, noise_conditioning=True)
TIMESTEPS = torch.tensor([500, 20])


def random_picture(size: int, seed: int, rows: int = 1) -> torch.Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_condition(config: UpsamplerConfig) -> UpsamplerCondition:
    level = torch.tensor([7, 300]) if config.noise_conditioning else None
    return UpsamplerCondition(random_picture(16, 1, rows=2), level)


def test_low_res_is_interpolated_between_pixel_centres() -> None:
    ramp = torch.arange(4.0).expand(1, 3, 4, 4)
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(upsample_low_res(ramp, (8, 8)), expected.expand(1, 3, 8, 8))


@pytest.mark.parametrize("config", [CONFIG, NOISED], ids=["plain", "noised"])
def test_low_res_picture_time_and_state_matter(
    randomized: Callable[[nn.Module], nn.Module], config: UpsamplerConfig
) -> None:
    model, x_t, cond = randomized(config.build()), random_picture(16, 0, rows=2), make_condition(config)
    output = model(x_t, TIMESTEPS, cond)
    others = [
        model(x_t, TIMESTEPS, dataclasses.replace(cond, low_res=-cond.low_res)),
        model(-x_t, TIMESTEPS, cond),
        model(x_t, TIMESTEPS + 1, cond),
    ]
    if cond.noise_level is not None:
        others.append(model(x_t, TIMESTEPS, dataclasses.replace(cond, noise_level=cond.noise_level + 100)))
    for changed in others:
        assert (changed - output).abs().flatten(1).amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("config", [CONFIG, NOISED], ids=["plain", "noised"])
def test_prepared_is_the_same_and_batches_are_their_samples(
    randomized: Callable[[nn.Module], nn.Module], config: UpsamplerConfig
) -> None:
    model, x_t, cond = randomized(config.build()), random_picture(16, 0, rows=2), make_condition(config)
    output, prepared = model(x_t, TIMESTEPS, cond), model.prepare(cond)
    torch.testing.assert_close(model(x_t, TIMESTEPS, prepared), output, rtol=0, atol=0)
    for rows in (torch.tensor([0]), torch.tensor([1])):
        single = model(x_t[rows], TIMESTEPS[rows], prepared.select(rows))
        torch.testing.assert_close(single, output[rows], rtol=1e-4, atol=1e-4)


def test_a_crop_gives_the_same_as_the_whole(
    randomized: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away from the crop's edge, once the statistics that GroupNorm takes over the whole picture are left out."""
    monkeypatch.setattr(nn.functional, "group_norm", lambda x, *_: x / 2)
    model, timesteps = randomized(CONFIG.build()), torch.tensor([500])
    x_t, low_res = random_picture(96, 0), random_picture(24, 1)
    whole = model(x_t, timesteps, UpsamplerCondition(upsample_low_res(low_res, (96, 96))))
    part = upsample_low_res(low_res[:, :, 4:20, 4:20], (64, 64))
    crop = model(x_t[:, :, 16:80, 16:80], timesteps, UpsamplerCondition(part))
    inside = slice(24, 40)
    torch.testing.assert_close(crop[:, :, inside, inside], whole[:, :, 40:56, 40:56], rtol=1e-4, atol=1e-4)
    assert whole[:, :, 40:56, 40:56].std() > 1e-2


def test_any_size_and_bfloat16() -> None:
    model, low_res = NOISED.build().bfloat16(), torch.randn(2, 3, 16, 24)
    output = model(torch.randn(2, 3, 16, 24), torch.tensor([0, 9]), UpsamplerCondition(low_res, torch.tensor([1, 2])))
    assert output.shape == (2, 3, 16, 24)
    assert output.dtype == torch.float32
    (output - 1).square().mean().backward()
    assert model.unet.head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_compiles_without_graph_breaks(randomized: Callable[[nn.Module], nn.Module]) -> None:
    model, x_t, cond = randomized(NOISED.build()), random_picture(16, 0, rows=2), make_condition(NOISED)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x_t, TIMESTEPS, cond), model(x_t, TIMESTEPS, cond))


def test_conditions_that_do_not_fit_are_named() -> None:
    x_t, low_res = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"low_res has shape \(1, 3, 4, 4\), but x_t \(1, 3, 16, 16\)"):
        CONFIG.build()(x_t, torch.zeros(1), UpsamplerCondition(low_res))
    with pytest.raises(ValueError, match="noise_level is missing, but noise_conditioning = True"):
        NOISED.build()(x_t, torch.zeros(1), UpsamplerCondition(x_t))
    with pytest.raises(ValueError, match="noise_level is given, but noise_conditioning = False"):
        CONFIG.build()(x_t, torch.zeros(1), UpsamplerCondition(x_t, torch.zeros(1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_resolutions": (8,), "head_channels": 8}, "must be empty"),
        ({"in_channels": 3}, "in_channels = 3: must be 6"),
    ],
)
def test_other_nets_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpsamplerConfig(unet=UNetConfig(**(UNET.to_dict() | changes)))


def test_the_last_step_has_a_network_of_its_own(randomized: Callable[[nn.Module], nn.Module]) -> None:
    """At timestep 0, for each sample of a batch by itself."""
    config = UpsamplerConfig(unet=UNET, last_step=True)
    model, x_t = randomized(config.build()), random_picture(16, 0, rows=4)
    cond, timesteps = UpsamplerCondition(random_picture(16, 1, rows=4)), torch.tensor([0, 500, 0, 20])
    x = torch.cat([x_t, cond.low_res], dim=1)
    first, last = model.unet(x, timesteps), model.last_unet(x, timesteps)
    assert (first - last).abs().flatten(1).amax(dim=1).min() > 1e-2
    expected = torch.where((timesteps == 0)[:, None, None, None], last, first)
    torch.testing.assert_close(model(x_t, timesteps, cond), expected, rtol=1e-5, atol=1e-5)
    for rows in ([0, 2], [1, 3]):
        part = model(x_t[rows], timesteps[rows], model.prepare(cond).select(torch.tensor(rows)))
        torch.testing.assert_close(part, expected[rows], rtol=1e-5, atol=1e-5)


def test_bicubic_is_antialiased_and_another_than_bilinear() -> None:
    """As Karlo enlarges: with antialiasing, where that makes no difference, and smaller with one."""
    small, large = random_picture(8, 0), random_picture(16, 0)
    resized = upsample_low_res(small, (16, 16), "bicubic")
    expected = nn.functional.interpolate(small, (16, 16), mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(resized, expected, rtol=0, atol=0)
    assert (resized - upsample_low_res(small, (16, 16))).abs().max() > 1e-2
    assert upsample_low_res(large, (8, 8), "bicubic").std() < large.std() / 1.5
