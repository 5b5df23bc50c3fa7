from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerCondition, UpsamplerConfig, upsample_low_res

UNET = UNetConfig(in_channels=6, channels=8, channel_mult=(1, 2), depth=1, image_size=16)
CONFIG = UpsamplerConfig(unet=UNET)


def random_picture(size: int, seed: int) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_low_res_is_interpolated_between_pixel_centres() -> None:
    ramp = torch.arange(4.0).expand(1, 3, 4, 4)
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(upsample_low_res(ramp, (8, 8)), expected.expand(1, 3, 8, 8))


def test_low_res_picture_time_and_state_matter(randomized: Callable[[nn.Module], nn.Module]) -> None:
    model, timesteps = randomized(CONFIG.build()), torch.tensor([500])
    x_t, low_res = random_picture(16, 0), random_picture(4, 1)
    output = model(x_t, timesteps, UpsamplerCondition(low_res))
    for changed in (
        model(x_t, timesteps, UpsamplerCondition(-low_res)),
        model(-x_t, timesteps, UpsamplerCondition(low_res)),
        model(x_t, timesteps + 1, UpsamplerCondition(low_res)),
    ):
        assert (changed - output).abs().amax() > 1e-3


def test_a_crop_gives_the_same_as_the_whole(
    randomized: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away from the crop's edge, once the statistics that GroupNorm takes over the whole picture are left out."""
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda _self, x: x / 2)
    model, timesteps = randomized(CONFIG.build()), torch.tensor([500])
    x_t, low_res = random_picture(96, 0), random_picture(24, 1)
    whole = model(x_t, timesteps, UpsamplerCondition(low_res))
    crop = model(x_t[:, :, 16:80, 16:80], timesteps, UpsamplerCondition(low_res[:, :, 4:20, 4:20]))
    inside = slice(24, 40)
    torch.testing.assert_close(crop[:, :, inside, inside], whole[:, :, 40:56, 40:56], rtol=1e-4, atol=1e-4)
    assert whole[:, :, 40:56, 40:56].std() > 1e-2


def test_any_size_and_bfloat16() -> None:
    model = CONFIG.build().bfloat16()
    output = model(torch.randn(2, 3, 16, 24), torch.tensor([0, 9]), UpsamplerCondition(torch.randn(2, 3, 4, 6)))
    assert output.shape == (2, 3, 16, 24)
    assert output.dtype == torch.float32
    (output - 1).square().mean().backward()
    assert model.unet.head.weight.grad.abs().sum() > 0


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
