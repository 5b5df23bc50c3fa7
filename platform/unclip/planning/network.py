"""What a plan needs to know of a run's network, counted without building it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unclip.planning.activations import StepMemory, count_step_memory
from unclip.training.config import TrainConfig
from unclip.training.dry_step import DryStep
from unclip.training.flops import training_flops

_LOW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Network:
    """parameters: of the trained module. low_parameters: those whose gradients and gathered weights DeepSpeed sends in
    bfloat16 under autocast: of modules that are exactly linear layers or convolutions. largest: of one parameter. flops:
    of a sample's forward and backward pass. step: memory of one micro-batch's.
    """

    parameters: int
    low_parameters: int
    largest: int
    flops: float
    step: StepMemory


def count_network(config: TrainConfig) -> Network:
    """Counts on fake tensors: seconds for billions of parameters, no memory to speak of."""
    with DryStep.of(config) as dry:
        module = dry.objective.model
        sizes = [parameter.numel() for parameter in module.parameters()]
        low = sum(
            parameter.numel()
            for part in module.modules()
            if type(part) in _LOW
            for parameter in part.parameters(recurse=False)
        )
    return Network(sum(sizes), low, max(sizes), training_flops(config), count_step_memory(config))
