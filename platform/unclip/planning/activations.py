"""What a step holds besides weights and their state, counted on fake tensors: every storage, from its making to its end.

Counted are tensors. What kernels take for themselves while they run (workspaces of convolutions, say) is not.
"""

from __future__ import annotations

import weakref
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from unclip.training.config import TrainConfig
from unclip.training.dry_step import DryStep, empty_batch
from unclip.utils.memory import LiveTensors

_ALIGNMENT = 512
"""Bytes: CUDA's caching allocator hands out multiples."""

Bytes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Peak:
    """Bytes at the fullest moment: of activations, and of the parameters' gradients that are there at that moment."""

    activations: float
    gradients: float


@dataclass(frozen=True)
class StepMemory:
    """The forward and backward pass of a micro-batch, operation by operation (n,), as fixed + samples * per_sample.

    A peak is the largest of many straight lines: which operation is the fullest depends on the number of samples.
    gradients: bytes of the parameters' gradients complete by then; not part of the others.
    """

    fixed: Bytes
    per_sample: Bytes
    gradients: Bytes

    def peak(self, samples: int, *, kept: float) -> Peak:
        """The fullest moment of a micro-batch, where of gradients the share `kept` stays: 1 for all, 0 if they leave."""
        activations = self.fixed + samples * self.per_sample
        fullest = int((activations + kept * self.gradients).argmax())
        return Peak(float(activations[fullest]), float(kept * self.gradients[fullest]))


def count_step_memory(config: TrainConfig) -> StepMemory:
    """Runs two micro-batches, and draws a straight line through what they held after each operation."""
    few = 2  # one would be broadcast away here and there
    one, two = (_trace(config, size) for size in (few, 2 * few))
    slope = (two.activations - one.activations) / few
    return StepMemory(one.activations - few * slope, slope, one.gradients)


@dataclass(frozen=True)
class _Trace:
    activations: Bytes
    gradients: Bytes


def _trace(config: TrainConfig, samples: int) -> _Trace:
    """GPUs stand in as CPUs with float16: as many bytes as bfloat16, and the fused attention of GPUs.

    (Attention in bfloat16 is our own on CPUs, see `unclip.models.fused`.)
    """
    precision = config.zero.precision
    with DryStep.of(config) as dry:
        if precision == "bf16":
            _halve(dry.objective.model)
        ledger = _Ledger()
        for parameter in dry.objective.model.parameters():
            parameter.register_post_accumulate_grad_hook(ledger.is_gradient)
        with ledger:
            batch = empty_batch(config, samples)
            with torch.autocast("cpu", dtype=torch.float16, enabled=precision == "autocast"):
                loss = dry.loss(batch).loss
            loss.backward()
    return _Trace(np.array(ledger.activations, np.float64), np.array(ledger.gradients, np.float64))


def _halve(module: nn.Module) -> None:
    """`module.to(torch.float16)`, which cannot be asked of fake parameters."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.detach().to(torch.float16)))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(torch.float16) if buffer.is_floating_point() else buffer)


class _Ledger(LiveTensors):
    """What lives after each operation, the parameters' gradients apart."""

    def __init__(self) -> None:
        super().__init__(alignment=_ALIGNMENT)
        self.activations, self.gradients = array("q"), array("q")
        self._gradient_bytes = 0

    def is_gradient(self, parameter: torch.Tensor) -> None:
        """A parameter's gradient is complete: no activation any more."""
        assert parameter.grad is not None
        size = self.size(parameter.grad)
        self._gradient_bytes += size
        weakref.finalize(parameter.grad.untyped_storage(), self._gradient_ended, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.activations.append(self.bytes - self._gradient_bytes)
        self.gradients.append(self._gradient_bytes)
        return result

    def _gradient_ended(self, size: int) -> None:
        self._gradient_bytes -= size
