"""AdamW that also keeps the moving average of the weights; its parameter groups, and schedules by the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from unclip.config.base import Config


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019), its learning rate, and the moving average (EMA) of the weights."""

    learning_rate: float = Field(gt=0)
    """Highest learning rate, reached after the warm-up."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean squared gradient."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices and convolution kernels; biases, norms and embeddings are never decayed."""
    grad_clip: float = Field(default=0.0, ge=0)
    """Largest norm of the whole gradient; 0 turns clipping off."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the weights' moving average, which is what gets exported."""
    ema_warmup: bool = True
    """Let the average follow faster at first: decay min(ema_decay, (1 + step) / (10 + step))."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up: no change, or half a cosine down to min_lr_ratio at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly from near 0."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of the cosine, as a share of learning_rate."""

    def build(self, module: nn.Module) -> EmaAdamW:
        """The optimizer of all parameters of `module`."""
        return EmaAdamW(parameter_groups(module, self.weight_decay), self)


def learning_rate_at(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The learning rate of optimizer step number `step`, counted from 0, of a run of `max_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    ratio = config.min_lr_ratio + (1.0 - config.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * ratio


def ema_decay_at(step: int, config: OptimizerConfig) -> float:
    """The decay that optimizer step number `step`, counted from 0, applies to the moving average."""
    return min(config.ema_decay, (1 + step) / (10 + step)) if config.ema_warmup else config.ema_decay


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of `module` with and without weight decay, in the order of their names; empty groups are left out.

    Not decayed are vectors and scalars (biases, norms, temperatures), the weights of `nn.Embedding`, and what a module
    lists by its own attribute names in a class attribute `no_decay` (learned positions and tokens, say).
    """
    undecayed = set(_undecayed_names(module))
    named = sorted(module.named_parameters())
    decay = [p for name, p in named if name not in undecayed]
    keep = [p for name, p in named if name in undecayed]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _undecayed_names(module: nn.Module) -> Iterable[str]:
    for prefix, part in module.named_modules():
        marked = getattr(type(part), "no_decay", ())
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim <= 1 or isinstance(part, nn.Embedding) or name in marked:
                yield f"{prefix}.{name}" if prefix else name


class EmaAdamW(torch.optim.AdamW):
    """AdamW whose state holds, beside the moments, `ema`: the moving average of each parameter it updates.

    Under ZeRO the parameters are this rank's flat float32 partitions, so that the average is float32, as sharded as the
    moments, and costs no communication. It starts as a copy of the initial weights, and every step sets
    `ema = ema_decay * ema + (1 - ema_decay) * parameter`. `lr` and `ema_decay` of `param_groups` may be set before each
    step. Parameters without a gradient, and their averages, stay as they are.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for group in self.param_groups:
            group["ema_decay"] = config.ema_decay

    def state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """`step` (scalar float32), `exp_avg`, `exp_avg_sq`, `ema` (like the parameter); made where there are none."""
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:  # as AdamW makes it in its first step, where the weights from before the step are already lost
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
            state["ema"] = parameter.detach().clone()
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        updated = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        averages = [[self.state_of(p)["ema"] for p in parameters] for parameters in updated]
        super().step()
        for group, parameters, emas in zip(self.param_groups, updated, averages, strict=True):
            if parameters:
                torch._foreach_lerp_(emas, parameters, 1.0 - group["ema_decay"])
