"""Trainings at every ZeRO stage, precision and kind of offload, by any number of processes, and the same in plain PyTorch.

Functions that take (rank, world_size, folder) are what ranks run; they answer with what JSON can hold.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from unclip.training import zero_state
from unclip.training.engine import Engine, ZeroConfig
from unclip.training.optim import OptimizerConfig

GLOBAL_BATCH, STEPS, RATE = 8, 5, 3e-3
OPTIMIZER = OptimizerConfig(
    learning_rate=RATE, beta2=0.99, eps=1e-6, weight_decay=0.1, grad_clip=0.2, ema_decay=0.5, ema_warmup=True
)
"""Adam's eps keeps the rounding of sums in another order from becoming steps where a gradient is nothing else."""
State = dict[str, torch.Tensor]
Difference = dict[str, float]
"""Largest and root mean square difference of weights and their averages, and the largest one of moments relative to the
largest element of their tensor."""
Answers = dict[Any, dict[str, Any]]
"""What the ranks have found, by case or by number of processes."""
SAME = {"weights": 0.0, "rms": 0.0, "moments": 0.0}
PLAIN = {
    f"stage {stage}, {precision}": {"stage": stage, "precision": precision}
    for stage, precision in itertools.product(range(4), ("fp32", "autocast", "bf16"))
    if stage or precision != "bf16"
}
ON_CPU = {
    f"stage {stage}, {precision}, optimizer on {optimizer}, parameters on {parameters}": {
        "stage": stage, "precision": precision, "offload_optimizer": optimizer, "offload_parameters": parameters}
    for stage, precision, optimizer, parameters in (
        (1, "fp32", "cpu", "none"), (2, "fp32", "cpu", "none"), (3, "fp32", "cpu", "none"),
        (1, "bf16", "cpu", "none"), (2, "bf16", "cpu", "none"), (3, "bf16", "cpu", "cpu"),
        (3, "autocast", "cpu", "cpu"), (3, "fp32", "none", "cpu"),
    )
}  # fmt: skip
ON_DISK = {
    f"stage 3, {precision}, optimizer on {optimizer}, parameters on {parameters}": {
        "stage": 3, "precision": precision, "offload_optimizer": optimizer, "offload_parameters": parameters}
    for precision, optimizer, parameters in (
        ("fp32", "nvme", "none"), ("autocast", "nvme", "cpu"), ("bf16", "nvme", "nvme"), ("bf16", "none", "nvme"),
    )
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = PLAIN | ON_CPU | ON_DISK
OF_FOUR = [*(f"stage {stage}, fp32" for stage in range(4)), "stage 3, bf16, optimizer on cpu, parameters on cpu"]
"""On four processes there is less of everything but imports."""


class Tiny(nn.Module):
    """Odd sizes everywhere; `wide` is above DeepSpeed's threshold for partitioning a weight at stage 3 (100,000)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 331)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)  # one group: the gradient of the bias before it is not just rounding
        self.wide = nn.Linear(331, width)
        self.out = nn.Linear(width, 5)
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.norm(self.conv(x[:, None, None])).mean(dim=(1, 2)) + x
        return self.out(nn.functional.silu(self.wide(x))) * (317 / self.wide.out_features)  # steps as long at any width


@dataclass
class Output:
    loss: torch.Tensor


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(13, (GLOBAL_BATCH,), generator=generator), torch.randn(GLOBAL_BATCH, 5, generator=generator)


def loss_of(model: nn.Module, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(tokens).float(), target)


def width_of(case: str) -> int:
    """On disk lies only what has 1 MiB on a rank: `wide`, in bfloat16 on two and in float32 on four."""
    return 3200 if "nvme" in case else 317


def new_engine(case: str, folder: Path, *, seed: int, accumulation: int = 1) -> Engine:
    torch.manual_seed(seed)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return Engine(
        Tiny(width_of(case)),
        OPTIMIZER,
        ZeroConfig(**CASES[case], nvme_path=str(folder / "disk")),
        microbatch_size=GLOBAL_BATCH // (world_size * accumulation),
        accumulation_steps=accumulation,
        device=torch.device("cpu"),
    )


def train(engine: Engine, steps: range, accumulation: int = 1, spoil: bool = False) -> list[float]:
    """Each rank takes every `world_size`-th micro-batch; returns the gradient norms. `spoil` makes the loss NaN."""
    norms = []
    for step in steps:
        parts = [part.chunk(accumulation * engine.world_size) for part in data(step)]
        for index in range(engine.rank, accumulation * engine.world_size, engine.world_size):
            tokens, target = parts[0][index], parts[1][index] * (math.nan if spoil else 1.0)
            output = engine.forward(lambda t=tokens, y=target: Output(loss_of(engine.module, t, y)))  # type: ignore[misc]
            engine.backward(output.loss)
        norms.append(engine.step(RATE))
    return norms


@cache
def plain_torch(steps: int, precision: str, width: int) -> tuple[State, list[float]]:
    """The same training without DeepSpeed, our optimizer or workers: the truth."""
    torch.manual_seed(0)
    model = Tiny(width)
    if precision == "bf16":
        model.to(torch.bfloat16)
    masters = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    undecayed = [p for n, p in masters.items() if n.endswith("bias") or n.startswith(("norm", "embed"))]
    decayed = [masters[name] for name in ("conv.weight", "wide.weight", "out.weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), eps=1e-6, foreach=False)
    ema = {name: p.clone() for name, p in masters.items()}
    norms = []
    for step in range(steps):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = loss_of(model, *data(step))
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            masters[name].grad = p.grad.float()
        norms.append(float(nn.utils.clip_grad_norm_(masters.values(), 0.2)))
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            ema[name] = decay * ema[name] + (1 - decay) * masters[name]
            p.data.copy_(masters[name])
    state = {f"ema/{name}": value for name, value in ema.items()}
    for name, p in masters.items():
        state[f"fp32/{name}"] = p
        state |= {f"{kind}/{name}": optimizer.state[p][kind] for kind in ("exp_avg", "exp_avg_sq")}
    return state, norms


def whole_state(engine: Engine) -> State:
    """The state of all ranks, put together on every rank from their fragments. Collective."""
    mine = [
        (f.name, f.start, {kind: tensor.clone() for kind, tensor in f.tensors.items()})
        for f in zero_state.fragments(engine)
    ]
    everyone: list[Any] = [None] * engine.world_size
    dist.all_gather_object(everyone, mine)
    shapes = zero_state.shapes(engine)
    state = {
        f"{kind}/{name}": torch.full(shape, math.nan) for name, shape in shapes.items() for kind in zero_state.KINDS
    }
    for name, start, tensors in itertools.chain.from_iterable(everyone):
        for kind, tensor in tensors.items():
            state[f"{kind}/{name}"].view(-1)[start : start + tensor.numel()] = tensor
    return state


def fill(engine: Engine, state: State, step: int) -> None:
    def read(name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        return state[f"{kind}/{name}"].view(-1)[start : start + numel]

    zero_state.restore(engine, read, step)


def difference(one: State, other: State) -> Difference:
    """How far two states are apart."""
    assert one.keys() == other.keys()
    moments = max(relative(one[key], other[key]) for key in one if key.startswith("exp_avg"))
    apart = torch.cat([(one[key] - other[key]).flatten() for key in one if not key.startswith("exp_avg")])
    return {"weights": float(apart.abs().max()), "rms": float(apart.square().mean().sqrt()), "moments": moments}


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def assert_close(found: Difference, precision: str) -> None:
    """fp32: rounding, 1/500 of a step at most; plain PyTorch with other micro-batches is up to RATE / 1100 and, in moments,
    5.5e-5 from itself in float64. Else: Adam makes whole steps of the smallest gradients, so a weight here and there may
    differ by some steps, the typical one by 1/30 of the way."""
    if precision == "fp32":
        assert found["weights"] < RATE / 500
        assert found["moments"] < 1.1e-4
    else:
        assert found["rms"] < STEPS * RATE / 30
        assert found["moments"] < 0.1


# --- what the ranks run ---------------------------------------------------------------------------------------------


def two_ranks(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return all_cases(rank, folder, [*PLAIN, *ON_CPU])


def two_ranks_with_disks(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return all_cases(rank, folder, [*ON_DISK])


def four_ranks(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return all_cases(rank, folder, OF_FOUR)


def all_cases(rank: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """All comparisons; collective."""
    answers: dict[str, Any] = {name: one_layout(rank, folder, name) for name in names}
    from deepspeed.comm import comm as deepspeed_comm

    answers["compiled"] = {"all-reduce": deepspeed_comm.cdb.shm_comm_op is not None}
    return answers


def one_layout(rank: int, folder: Path, case: str) -> dict[str, Any]:
    precision = CASES[case]["precision"]
    truth, norms = plain_torch(STEPS, precision, width_of(case))
    engine = new_engine(case, folder, seed=rank)  # another seed on rank 1: it must start from rank 0's weights
    found = train(engine, range(2))
    early = whole_state(engine)
    spoiled = train(engine, range(2, 3), spoil=True)
    skipped = difference(whole_state(engine), early)
    found += train(engine, range(2, STEPS))
    straight = whole_state(engine)

    resumed = new_engine(case, folder, seed=7)
    fill(resumed, early, 2)
    train(resumed, range(2, STEPS))
    again = whole_state(resumed)

    accumulated = new_engine(case, folder, seed=rank, accumulation=2)
    train(accumulated, range(STEPS), accumulation=2)
    return {
        "truth": difference(straight, truth),
        "norms": max(abs(a / b - 1) for a, b in zip(found, norms, strict=True)),
        "spoiled": str(spoiled[0]),
        "skipped": skipped,
        "steps": [engine.steps, resumed.steps],
        "resumed": difference(again, straight),
        "accumulated": difference(whole_state(accumulated), straight),
        "computes in": str(engine.forward(lambda: Output(engine.module(data(0)[0]).mean())).loss.dtype),
        "weights beyond bf16": beyond_bf16(straight),
        "coverage": coverage(engine),
        "swapped": swapped(engine),
        "dtypes": sorted({str(p.dtype) for p in engine.module.parameters()}),
    }


def beyond_bf16(state: State) -> float:
    """Share of weights that bfloat16 could not hold."""
    weights = torch.cat([value.flatten() for key, value in state.items() if key.startswith("fp32")])
    return float((weights != weights.bfloat16()).float().mean())


def swapped(engine: Engine) -> list[str]:
    """What this rank has on disk: kinds of state by its sub-groups, and parameters."""
    folder = getattr(engine, "_swap_folder", None)
    files = [] if folder is None else [path.name for path in folder.path.rglob("*.swp")]
    kinds = (re.search("exp_avg_sq|exp_avg|ema|param", name) for name in files)
    return sorted({kind[0] if kind else "fp32" for kind in kinds})


def coverage(engine: Engine) -> list[Any]:
    """[name, elements, sorted slices of all ranks] of every parameter."""
    mine = [[f.name, f.start, f.numel] for f in zero_state.fragments(engine)]
    everyone: list[Any] = [None] * engine.world_size
    dist.all_gather_object(everyone, mine)
    slices: dict[str, list[list[int]]] = {}
    for name, start, numel in itertools.chain.from_iterable(everyone):
        slices.setdefault(name, []).append([start, numel])
    return [[name, math.prod(shape), sorted(slices[name])] for name, shape in zero_state.shapes(engine).items()]


# --- what must hold of an answer --------------------------------------------------------------------------------------


def check_training(case: str, found: dict[str, Any]) -> None:
    """It is plain AdamW on the global batch, whatever the micro-batches."""
    precision = CASES[case]["precision"]
    assert found["norms"] < {"fp32": 2e-6}.get(precision, 0.01)
    assert_close(found["truth"], precision)
    assert_close(found["accumulated"], precision)


def check_continuing(found: dict[str, Any]) -> None:
    """It is going on."""
    assert found["resumed"] == SAME
    assert found["steps"] == [STEPS, STEPS]


def check_spoiled_step(found: dict[str, Any]) -> None:
    """It changes nothing; nor is it seen in what follows, as `truth` shows, which it is part of."""
    assert found["spoiled"] == "inf"
    assert found["skipped"] == SAME


def check_precision(case: str, found: dict[str, Any]) -> None:
    """bfloat16 computes, float32 is updated."""
    precision = CASES[case]["precision"]
    assert found["computes in"] == ("torch.float32" if precision == "fp32" else "torch.bfloat16")
    assert found["dtypes"] == ["torch.bfloat16" if precision == "bf16" else "torch.float32"]
    assert found["weights beyond bf16"] > 0.9


def check_coverage(found: dict[str, Any]) -> None:
    """Fragments cover every element once."""
    for name, numel, slices in found["coverage"]:
        position = 0
        for start, length in slices:
            assert start == position, name
            position += length
        assert position == numel, name


def check_disk(case: str, found: dict[str, Any]) -> None:
    """What is offloaded to disk lies there, nothing else."""
    state = ["ema", "exp_avg", "exp_avg_sq", "fp32"] if CASES[case].get("offload_optimizer") == "nvme" else []
    parameters = ["param"] if CASES[case].get("offload_parameters") == "nvme" else []
    assert found["swapped"] == sorted(state + parameters)
