"""Which of the training timesteps a sampler visits. The explicit list is the only source of a step's predecessor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

TimestepSpacing = Literal["linspace", "leading", "trailing", "fast27"]

# GLIDE's steps for its upsampler (Nichol et al. 2021): most of them where the noise is low.
_FAST27 = (
    *(0, 22, 44, 66, 88, 111, 133, 155, 177, 199),
    *(200, 222, 244, 266, 288, 311, 333, 355, 377, 399),
    *(400, 500, 599, 600, 799, 800, 997),
)


def sampling_timesteps(num_train_timesteps: int, num_inference_steps: int, spacing: TimestepSpacing) -> list[int]:
    """The `num_inference_steps` (N) timesteps of a sampling run over T training steps, strictly descending.

    `linspace`: T - 1 down to 0, evenly spaced (only T - 1 where N is 1).
    `leading`: multiples of T // N, from 0 up.
    `trailing`: T - 1 and downwards by T / N, so that the steps end on the last of equal stretches.
    `fast27`: the 27 steps of GLIDE's upsampler; needs T = 1000 and N = 27.
    The first three are those of Lin et al. 2023 (arXiv 2305.08891), table 2; halves round to even.

    Raises `ValueError` where N is not in 1..T, the spacing is unknown, or T and N do not suit it.
    """
    total, count = num_train_timesteps, num_inference_steps
    if not 1 <= count <= total:
        raise ValueError(f"num_inference_steps must be between 1 and num_train_timesteps = {total}, not {count}")
    if spacing == "linspace":
        # Counted from the top, so that a single step is the noisiest one.
        return [round((count - 1 - i) * (total - 1) / (count - 1)) for i in range(count)] if count > 1 else [total - 1]
    if spacing == "leading":
        return [i * (total // count) for i in reversed(range(count))]
    if spacing == "trailing":
        return [round(total - i * total / count) - 1 for i in range(count)]
    if spacing == "fast27":
        if (total, count) != (1000, len(_FAST27)):
            raise ValueError(
                "timestep_spacing fast27 needs num_train_timesteps = 1000 and num_inference_steps = 27,"
                f" not {total} and {count}"
            )
        return list(reversed(_FAST27))
    raise ValueError(f"timestep_spacing must be linspace, leading, trailing or fast27, not {spacing!r}")


def explicit_timesteps(num_train_timesteps: int, timesteps: Sequence[int]) -> list[int]:
    """`timesteps` as they are, where they are a list that a sampler can visit.

    Raises `ValueError` where the list is empty, not strictly descending, or leaves 0..T-1.
    """
    if len(timesteps) == 0:
        raise ValueError("timesteps_list is empty: a sampler needs at least one timestep")
    inside = timesteps[-1] >= 0 and timesteps[0] < num_train_timesteps
    if not inside or any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
        raise ValueError(
            f"timesteps_list must be strictly descending and in 0..{num_train_timesteps - 1}, not {list(timesteps)}"
        )
    return list(timesteps)


def step_pairs(timesteps: Sequence[int], num_train_timesteps: int) -> list[tuple[int, int]]:
    """The (timestep, previous timestep) of each step of a run through `timesteps`; the last one goes to -1 (clean).

    Raises `ValueError` where `timesteps` is no list of `explicit_timesteps`.
    """
    timesteps = explicit_timesteps(num_train_timesteps, timesteps)
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))


def inversion_pairs(timesteps: Sequence[int], num_train_timesteps: int) -> list[tuple[int, int]]:
    """The (timestep, next timestep) of each step of the way up through `timesteps`, which are descending.

    The first one begins at the clean sample, which no network knows: it stays at the least timestep. Raises `ValueError`
    where `timesteps` is no list of `explicit_timesteps`.
    """
    ascending = explicit_timesteps(num_train_timesteps, timesteps)[::-1]
    return list(zip([ascending[0], *ascending[:-1]], ascending, strict=True))
