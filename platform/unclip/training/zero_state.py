"""This rank's share of the training state, by parameter name, at any ZeRO stage.

The one place that knows DeepSpeed's insides (0.19.8). Its own checkpoints are tied to a stage and a number of workers,
and its way around that drops the moving average and, at stage 3, mixes up parameter groups. Here a state is a set of
named 1-D slices, which can be cut anew for any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from unclip.training.engine import Engine

KINDS = ("fp32", "exp_avg", "exp_avg_sq", "ema")
"""What is kept of a parameter, all float32: the weights, Adam's two moments, and the moving average of the weights."""

Read = Callable[[str, str, int, int], torch.Tensor]
"""`read(name, kind, start, numel)`: elements `start … start + numel` of the flattened parameter `name`, (numel,)."""


@dataclass(frozen=True)
class Fragment:
    """Elements `start … start + numel` of the flattened parameter `name` of that `shape`.

    `tensors` maps each of `KINDS` to a (numel,) view of the live state, valid until the next fragment is asked for:
    state on disk is in memory only that long.
    """

    name: str
    start: int
    numel: int
    shape: tuple[int, ...]
    tensors: dict[str, torch.Tensor]


def fragments(engine: Engine) -> Iterator[Fragment]:
    """This rank's slices. Those of all ranks do not overlap and together hold every element of every parameter."""
    for fragment in _held(engine, changed=False):
        yield _share(fragment, engine.rank, engine.world_size) if engine.stage == 0 else fragment


@torch.no_grad()
def restore(engine: Engine, read: Read, step: int) -> None:
    """Fills weights, moments and averages from `read`, and sets the count of optimizer steps. Collective."""
    if engine.stage == 3:
        engine.zero_optimizer._partition_all_parameters()
    for fragment in _held(engine, changed=True):
        for kind, tensor in fragment.tensors.items():
            tensor.copy_(read(fragment.name, kind, fragment.start, fragment.numel))
    for state in engine.optimizer.state.values():
        state["step"].fill_(step)
    engine.steps = step
    _refresh_module(engine)


def shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name; at stage 3 the module itself shows emptied ones."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for p, name in engine.names.items()}


def buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers of `module` by name: what its state dict holds beside parameters."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _held(engine: Engine, *, changed: bool) -> Iterator[Fragment]:
    """All that this rank keeps: at stage 0 every parameter in full, else its partition. `changed`: it is written to."""
    if engine.stage == 3:
        held = _parameter_partitions(engine, changed)
    else:
        held = _flat_partitions(engine) if engine.stage else _replicated(engine)
    return (fragment for fragment in held if fragment.numel)


def _replicated(engine: Engine) -> Iterator[Fragment]:
    for parameter, name in engine.names.items():
        numel = parameter.numel()
        yield Fragment(name, 0, numel, tuple(parameter.shape), _views(engine, parameter, 0, numel))


def _flat_partitions(engine: Engine) -> Iterator[Fragment]:
    """Stages 1 and 2: a rank has one stretch of each group's flattened parameters; it may begin inside a parameter."""
    zero = engine.zero_optimizer
    for parameters, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:  # lies in the stretches of other ranks
                continue
            inside, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
            views = _views(engine, partition, inside.start, inside.numel)
            yield Fragment(engine.names[parameter], start, inside.numel, tuple(parameter.shape), views)


def _parameter_partitions(engine: Engine, changed: bool) -> Iterator[Fragment]:
    """Stage 3: a rank has an equal part of each parameter, the last ones padded to it."""
    for group, parameters in enumerate(engine.zero_optimizer.fp16_groups):
        with _in_memory(engine, group, changed) as partition:
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start = min(engine.rank * size, parameter.ds_numel)
                numel = min(size, parameter.ds_numel - start)
                views = _views(engine, partition, offset, numel)
                yield Fragment(engine.names[parameter], start, numel, tuple(parameter.ds_shape), views)
                offset += size


@contextmanager
def _in_memory(engine: Engine, group: int, changed: bool) -> Iterator[torch.Tensor]:
    """Stage 3's flat partition of a group, read from disk where it lies there, and written back where it was changed."""
    zero: Any = engine.zero_optimizer
    partition: torch.Tensor = zero.fp32_partitioned_groups_flat[group]
    swapped = zero._swappable_optimizer_subgroup(group)
    write = changed or partition not in engine.optimizer.state  # moments are made at the first look
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(group)
    try:
        yield partition
        if changed:  # the weights that compute are copies
            zero._reassign_or_swap_out_partitioned_parameters(group)
    finally:
        if swapped and write:
            zero._optimizer_states_and_gradient_swap_out(group)
        elif swapped:
            zero._release_swap_buffers(group)


def _views(engine: Engine, updated: torch.Tensor, start: int, numel: int) -> dict[str, torch.Tensor]:
    """Slices of the tensor that the optimizer updates and of its state."""
    state = engine.optimizer.state_of(updated)
    tensors = {"fp32": updated.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
    return {kind: tensor.view(-1).narrow(0, start, numel) for kind, tensor in tensors.items()}


def _share(fragment: Fragment, rank: int, world_size: int) -> Fragment:
    start = fragment.numel * rank // world_size
    numel = fragment.numel * (rank + 1) // world_size - start
    tensors = {kind: tensor.narrow(0, start, numel) for kind, tensor in fragment.tensors.items()}
    return Fragment(fragment.name, fragment.start + start, numel, fragment.shape, tensors)


def _refresh_module(engine: Engine) -> None:
    """Brings the module's weights up to what the optimizer holds, as the optimizer's own step ends."""
    zero = engine.zero_optimizer
    if engine.stage in (1, 2):
        zero.update_lp_params()
    elif engine.stage == 3 and zero.persistent_parameters:  # small ones, which every rank keeps whole
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
