"""Sampling from one stage: its configuration and its network behind one method.

Every `sample` draws from one stream a picture, so what comes out for a picture does not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from unclip.diffusion.samplers import Progress, SamplingConfig
from unclip.models.decoder import DecoderCondition
from unclip.models.prior import PriorCondition
from unclip.models.text import caption_mask
from unclip.models.upsampler import UpsamplerCondition
from unclip.pipelines.stages import PICTURE_CHANNELS, DecoderStageConfig, PriorStageConfig, UpsamplerStageConfig
from unclip.utils.random import SampleGenerator


class PriorStage:
    """Caption to CLIP image embedding (unCLIP §2.2).

    Args:
        config: the stage as the bundle describes it.
        model: its network, on the device and in the precision that it is to run in; the sampler is always float32.
    """

    def __init__(self, config: PriorStageConfig, model: nn.Module) -> None:
        self.config = config
        self._denoise = model
        self._process = config.diffusion.build()
        self._normalizer = config.normalizer.build().to(_device(model))

    def sample(
        self,
        text_embed: torch.Tensor,
        tokens: torch.Tensor,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """z_i (B, D) of unit norm: the best of `config.num_draws` for each caption.

        "We improve quality by generating two samples of z_i and selecting the one with a higher dot product with z_t"
        (§2.2). CLIP's embeddings lie on the unit sphere, and so the draws are put back on it.

        Args:
            text_embed: (B, D) z_t, unit norm.
            tokens: (B, L) int64 in the context length of this stage.
            generator: a stream for each of the B captions.
        """
        draws, batch = self.config.num_draws, len(text_embed)
        streams = SampleGenerator(torch.cat([generator.child(f"draw {draw}").keys for draw in range(draws)]))
        text_embed, tokens = text_embed.repeat(draws, 1), tokens.repeat(draws, 1)
        cond = PriorCondition(
            text_embed=text_embed,
            tokens=tokens,
            text_mask=caption_mask(tokens),
            text_dropped=tokens.new_zeros(len(tokens), dtype=torch.bool),
        )
        x_T = streams.normal((text_embed.shape[1],))
        normalized = sampling.sample(self._denoise, x_T, self._process, streams, cond, progress=progress)
        image_embed = functional.normalize(self._normalizer.denormalize(normalized), dim=1)
        similarity = (image_embed * functional.normalize(text_embed, dim=1)).sum(dim=1).view(draws, batch)
        best = similarity.argmax(dim=0)
        return image_embed.view(draws, batch, -1)[best, torch.arange(batch, device=best.device)]


class DecoderStage:
    """CLIP image embedding and caption to the first picture (§2.1); arguments as for `PriorStage`."""

    def __init__(self, config: DecoderStageConfig, model: nn.Module) -> None:
        self.config = config
        self._denoise = _channels_last(model)
        self._process = config.diffusion.build()
        self._normalizer = config.normalizer.build().to(_device(model))

    def sample(
        self,
        image_embed: torch.Tensor,
        tokens: torch.Tensor,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1], S = `config.image_size`.

        Args:
            image_embed: (B, D) z_i, unit norm.
            tokens: (B, L) int64 in the context length of this stage.
            generator: a stream for each of the B pictures.
        """
        kept = tokens.new_zeros(len(tokens), dtype=torch.bool)
        cond = DecoderCondition(
            image_embed=self._normalizer.normalize(image_embed),
            tokens=tokens,
            text_mask=caption_mask(tokens),
            image_dropped=kept,
            text_dropped=kept,
        )
        x_T = _picture_noise(generator, self.config.image_size)
        return sampling.sample(self._denoise, x_T, self._process, generator, cond, progress=progress).clamp(-1, 1)


class UpsamplerStage:
    """A picture to the same picture several times as large (§2.1); arguments as for `PriorStage`."""

    def __init__(self, config: UpsamplerStageConfig, model: nn.Module) -> None:
        self.config = config
        self._denoise = _channels_last(model)
        self._process = config.diffusion.build()

    def sample(
        self,
        low_res: torch.Tensor,
        generator: SampleGenerator,
        *,
        sampling: SamplingConfig,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1], S = `config.image_size`.

        Args:
            low_res: (B, 3, s, s) in [-1, 1] with s = `config.low_res_size`, on the grid of 8-bit pictures.
            generator: a stream for each of the B pictures.
        """
        expected = (PICTURE_CHANNELS, self.config.low_res_size, self.config.low_res_size)
        if tuple(low_res.shape[1:]) != expected:
            raise ValueError(f"low_res must be (B, {', '.join(map(str, expected))}), not {tuple(low_res.shape)}")
        cond = UpsamplerCondition(low_res=low_res)
        x_T = _picture_noise(generator, self.config.image_size)
        return sampling.sample(self._denoise, x_T, self._process, generator, cond, progress=progress).clamp(-1, 1)


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded to the nearest of the 256 values."""
    return pictures.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_signed(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory: the inverse of `to_uint8`."""
    return pictures.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1)


def _picture_noise(generator: SampleGenerator, size: int) -> torch.Tensor:
    return generator.normal((PICTURE_CHANNELS, size, size)).contiguous(memory_format=torch.channels_last)


def _channels_last(model: nn.Module) -> nn.Module:
    """The same network with its convolutions' weights in the layout that they are fastest in."""
    return model.to(memory_format=torch.channels_last)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
