"""Beta schedules: how much noise each step of the forward process adds."""

from __future__ import annotations

import math
from typing import Literal

import torch

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


def beta_schedule(name: BetaSchedule, num_train_timesteps: int) -> torch.Tensor:
    """The betas of `num_train_timesteps` (T) forward steps, least noise first: (T,) float64 in (0, 1).

    `linear`: from 1e-4 to 0.02 at T = 1000 and scaled by 1000 / T otherwise (Ho et al. 2020, section 4).
    `scaled_linear`: linear in the square root of beta, from 0.00085 to 0.012 at T = 1000 and scaled by 1000 / T
    otherwise (latent diffusion, Rombach et al. 2022).
    `squaredcos_cap_v2`: the cosine schedule, betas capped at 0.999 (Nichol and Dhariwal 2021, section 3.2).

    The tensor is on the CPU, whatever the default device.

    Raises `ValueError` for an unknown name, for T below 1, and where T is so small that a scaled beta would reach 1.
    """
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, not {num_train_timesteps}")
    if name == "linear":
        return _scaled(name, _linspace(1e-4, 0.02, num_train_timesteps), largest=0.02)
    if name == "scaled_linear":
        return _scaled(name, _linspace(0.00085**0.5, 0.012**0.5, num_train_timesteps) ** 2, largest=0.012)
    if name == "squaredcos_cap_v2":
        return _squaredcos_cap_v2(num_train_timesteps)
    raise ValueError(f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, not {name!r}")


def rescale_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """`alphas_cumprod` (T,) shifted and scaled so that the last is 0 and the first stays (Lin et al. 2023, algorithm 1).

    At the last timestep x_t is then nothing but noise, which is what sampling starts from.
    Raises `ValueError` where T is 1: the first would be the last.
    """
    if len(alphas_cumprod) < 2:
        raise ValueError(f"zero_terminal_snr needs num_train_timesteps of at least 2, not {len(alphas_cumprod)}")
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))) ** 2


def _linspace(first: float, last: float, count: int) -> torch.Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")


def _scaled(name: str, betas: torch.Tensor, largest: float) -> torch.Tensor:
    """Betas made for T = 1000, for as many steps as there are: about the same noise in all."""
    shortest = round(largest * 1000)
    if len(betas) <= shortest:
        raise ValueError(
            f"num_train_timesteps = {len(betas)}: beta_schedule {name} needs more than {shortest}, as its largest beta is "
            f"{shortest} / num_train_timesteps; use squaredcos_cap_v2 for shorter processes"
        )
    return betas * (1000 / len(betas))


def _squaredcos_cap_v2(num_train_timesteps: int) -> torch.Tensor:
    time = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
    # Improved DDPM eq. 17; the offset 0.008 keeps the first betas from vanishing.
    alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
