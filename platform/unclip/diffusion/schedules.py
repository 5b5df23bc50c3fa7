"""Beta schedules: how much noise each step of the forward process adds."""

from __future__ import annotations

import math
from typing import Literal

import torch

BetaSchedule = Literal["linear", "squaredcos_cap_v2"]


def beta_schedule(name: BetaSchedule, num_train_timesteps: int) -> torch.Tensor:
    """The betas of `num_train_timesteps` (T) forward steps, least noise first: (T,) float64 in (0, 1).

    `linear`: from 1e-4 to 0.02 at T = 1000 and scaled by 1000 / T otherwise (Ho et al. 2020, section 4).
    `squaredcos_cap_v2`: the cosine schedule, betas capped at 0.999 (Nichol and Dhariwal 2021, section 3.2).

    The tensor is on the CPU, whatever the default device.

    Raises `ValueError` for an unknown name, for T below 1, and for a linear schedule with T of 20 or less, whose betas
    would reach 1.
    """
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, not {num_train_timesteps}")
    if name == "linear":
        return _linear(num_train_timesteps)
    if name == "squaredcos_cap_v2":
        return _squaredcos_cap_v2(num_train_timesteps)
    raise ValueError(f"beta_schedule must be linear or squaredcos_cap_v2, not {name!r}")


def _linear(num_train_timesteps: int) -> torch.Tensor:
    if num_train_timesteps <= 20:
        raise ValueError(
            f"num_train_timesteps = {num_train_timesteps}: beta_schedule linear needs more than 20,"
            " as its largest beta is 20 / num_train_timesteps; use squaredcos_cap_v2 for shorter processes"
        )
    scale = 1000 / num_train_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps, dtype=torch.float64, device="cpu")


def _squaredcos_cap_v2(num_train_timesteps: int) -> torch.Tensor:
    time = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
    # Improved DDPM eq. 17; the offset 0.008 keeps the first betas from vanishing.
    alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
