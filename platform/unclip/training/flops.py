"""FLOPs of training, counted from the network that is trained."""

from __future__ import annotations

from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unclip.training.config import TrainConfig
from unclip.training.dry_step import DryStep, empty_batch

_SAMPLES = 2
"""Of the counted micro-batch; the count is per sample. Two, so that nothing of a batch is broadcast away."""


def training_flops(config: TrainConfig) -> float:
    """Model FLOPs of one sample's forward and backward pass.

    Matrix products, convolutions and attention, a multiply-add is two. Counted as `torch.utils.flop_counter` sees the run's
    own loss on fake tensors, so networks that the objective runs besides (sharpness-aware ascent) are included. What is
    computed again instead of kept (activation checkpointing, fused attention's scores) is not: these are the FLOPs
    of the model that MFU divides by (Chowdhery et al. 2022, appendix B). Nothing is allocated; seconds for billions of
    parameters.
    """
    with DryStep.of(with_checkpointing(config, enabled=False)) as dry, sdpa_kernel(SDPBackend.MATH):
        batch = empty_batch(config, _SAMPLES)
        with FlopCounterMode(display=False) as counter:
            dry.loss(batch).loss.backward()
    return counter.get_total_flops() / _SAMPLES


def with_checkpointing(config: TrainConfig, *, enabled: bool) -> TrainConfig:
    """The same run with or without activation checkpointing in all networks that have it."""
    return config.merged({"objective": _switched(config.objective.to_dict(), enabled=enabled)})


def _switched(settings: dict[str, Any], *, enabled: bool) -> dict[str, Any]:
    changed = {name: _switched(value, enabled=enabled) for name, value in settings.items() if isinstance(value, dict)}
    return (
        settings | changed | ({"activation_checkpointing": enabled} if "activation_checkpointing" in settings else {})
    )
