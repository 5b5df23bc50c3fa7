"""DeepSpeed at every ZeRO stage against plain PyTorch on one process, and checkpoints across stages and worker counts.

All two-process cases run in one launch (imports cost more than they do); the tests read its answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from unclip.training import checkpoint, zero_state
from unclip.training.engine import Engine, ZeroConfig
from unclip.training.export import full_state_dict
from unclip.training.optim import OptimizerConfig, parameter_groups

GLOBAL_BATCH, STEPS, RATE = 8, 5, 3e-3
STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")
OPTIMIZER = OptimizerConfig(
    learning_rate=RATE, beta2=0.99, weight_decay=0.1, grad_clip=0.2, ema_decay=0.5, ema_warmup=True
)
State = dict[str, torch.Tensor]
Difference = dict[str, float]
"""Largest and root mean square difference of weights and their averages, and the largest one of moments relative to the
largest element of their tensor."""
SAME = {"weights": 0.0, "rms": 0.0, "moments": 0.0}


class Tiny(nn.Module):
    """Odd sizes everywhere; `wide` is above DeepSpeed's threshold for partitioning a weight at stage 3 (100,000)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 331)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)  # one group: the gradient of the bias before it is not just rounding
        self.wide = nn.Linear(331, 317)
        self.out = nn.Linear(317, 5)
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = self.norm(self.conv(x[:, None, None])).mean(dim=(1, 2)) + x
        return self.out(nn.functional.silu(self.wide(x)))


@dataclass
class Output:
    loss: torch.Tensor


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(13, (GLOBAL_BATCH,), generator=generator), torch.randn(GLOBAL_BATCH, 5, generator=generator)


def loss_of(model: nn.Module, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(tokens).float(), target)


def new_engine(seed: int, stage: int, precision: str, accumulation: int = 1) -> Engine:
    torch.manual_seed(seed)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return Engine(
        Tiny(),
        OPTIMIZER,
        ZeroConfig(stage=stage, precision=precision),
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


def plain_torch(steps: int) -> tuple[State, list[float]]:
    """The same training without DeepSpeed, our optimizer or workers: the truth."""
    torch.manual_seed(0)
    model = Tiny()
    undecayed = [p for n, p in model.named_parameters() if n.endswith("bias") or n.startswith(("norm", "embed"))]
    decayed = [model.conv.weight, model.wide.weight, model.out.weight]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), foreach=False)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, *data(step)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.2)))
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            ema[name] = decay * ema[name] + (1 - decay) * p.detach()
    state = {f"ema/{name}": value for name, value in ema.items()}
    for name, p in model.named_parameters():
        state[f"fp32/{name}"] = p.detach()
        state |= {f"{kind}/{name}": optimizer.state[p][kind] for kind in ("exp_avg", "exp_avg_sq")}
    return state, norms


def opened(uri: Path) -> checkpoint.Checkpoint:
    found = checkpoint.open_committed(str(uri))
    assert found
    return found


def stored(uri: Path) -> State:
    """The whole state of a checkpoint, put together from its files."""
    found = opened(uri)
    with checkpoint.FragmentReader(found, verify=True) as reader:
        return {
            f"{kind}/{name}": reader.read(name, kind, 0, math.prod(shape)).view(shape)
            for name, shape in found.shapes.items()
            for kind in zero_state.KINDS
        }


def difference(one: State, other: State) -> Difference:
    """How far two states are apart."""
    assert one.keys() == other.keys()
    moments = max(relative(one[key], other[key]) for key in one if key.startswith("exp_avg"))
    apart = torch.cat([(one[key] - other[key]).flatten() for key in one if not key.startswith("exp_avg")])
    return {"weights": float(apart.abs().max()), "rms": float(apart.square().mean().sqrt()), "moments": moments}


def assert_close(found: Difference, precision: str) -> None:
    """fp32: rounding, 1/500 of a step at most. bf16: Adam makes whole steps of the smallest gradients, so a weight here
    and there may differ by some steps, the typical one by 1/30 of the way."""
    if precision == "fp32":
        assert found["weights"] < RATE / 500
        assert found["moments"] < 1e-5
    else:
        assert found["rms"] < STEPS * RATE / 30
        assert found["moments"] < 0.1


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def save(engine: Engine, uri: Path, step: int) -> State:
    """Saves, and returns the whole state on every rank."""
    checkpoint.save(str(uri), engine, {"step": step})
    dist.barrier()
    return stored(uri)


# --- what the two ranks run -----------------------------------------------------------------------------------------


def all_cases(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """All comparisons; collective."""
    from deepspeed.comm import comm as deepspeed_comm

    answers: dict[str, Any] = {}
    truth, norms = plain_torch(STEPS)
    for stage in STAGES:
        for precision in PRECISIONS:
            answers[f"{stage} {precision}"] = one_layout(rank, folder, stage, precision, truth, norms)
        answers[f"{stage} not finite"] = not_finite(rank, folder, stage)
    answers["chain"] = chain(folder)
    answers["compiled"] = deepspeed_comm.cdb.shm_comm_op is not None
    return answers


def one_layout(rank: int, run: Path, stage: int, precision: str, truth: State, norms: list[float]) -> dict[str, Any]:
    folder = run / f"{stage}-{precision}"
    engine = new_engine(rank, stage, precision)  # another seed on rank 1: it must start from rank 0's weights
    found = train(engine, range(2))
    save(engine, folder / "two", 2)
    found += train(engine, range(2, STEPS))
    straight = save(engine, folder / "straight", STEPS)

    resumed = new_engine(7, stage, precision)
    checkpoint.load(opened(folder / "two"), resumed)
    train(resumed, range(2, STEPS))
    again = save(resumed, folder / "resumed", STEPS)

    accumulated = new_engine(rank, stage, precision, accumulation=2)
    train(accumulated, range(STEPS), accumulation=2)
    with_accumulation = save(accumulated, folder / "accumulated", STEPS)
    return {
        "truth": difference(straight, truth),
        "norms": max(abs(a - b) for a, b in zip(found, norms, strict=True)),
        "resumed": difference(again, straight),
        "accumulated": difference(with_accumulation, straight),
        "computes in": str(engine.forward(lambda: Output(engine.module(data(0)[0]).mean())).loss.dtype),
        "weights beyond bf16": beyond_bf16(straight),
        "coverage": coverage(engine),
    }


def beyond_bf16(state: State) -> float:
    """Share of weights that bfloat16 could not hold."""
    weights = torch.cat([value.flatten() for key, value in state.items() if key.startswith("fp32")])
    return float((weights != weights.bfloat16()).float().mean())


def coverage(engine: Engine) -> list[Any]:
    """[name, elements, sorted slices of all ranks] of every parameter."""
    mine = [[f.name, f.start, f.numel] for f in zero_state.fragments(engine)]
    everyone: list[Any] = [None] * engine.world_size
    dist.all_gather_object(everyone, mine)
    slices: dict[str, list[list[int]]] = {}
    for name, start, numel in itertools.chain.from_iterable(everyone):
        slices.setdefault(name, []).append([start, numel])
    return [[name, math.prod(shape), sorted(slices[name])] for name, shape in zero_state.shapes(engine).items()]


def not_finite(rank: int, run: Path, stage: int) -> dict[str, Any]:
    folder = run / f"{stage}-spoiled"
    engine = new_engine(rank, stage, "fp32")
    train(engine, range(1))
    before = save(engine, folder / "before", 1)
    norms = train(engine, range(1, 2), spoil=True)
    after = save(engine, folder / "after", 1)
    train(engine, range(1, 2))
    final = save(engine, folder / "final", 2)
    return {
        "norm": str(norms[0]),
        "change": difference(after, before),
        "recovered": difference(final, plain_torch(2)[0]),
    }


def chain(shared: Path) -> dict[str, Difference]:
    """Continues what one process left at stage 3 after two steps: a step each at stages 1, 3, 2 on two processes."""
    answers = {}
    for precision in PRECISIONS:
        uri = shared / precision / "two"
        for step, stage in ((2, 1), (3, 3), (4, 2)):
            engine = new_engine(50 + step, stage, precision)
            checkpoint.load(opened(uri), engine, verify=True)
            train(engine, range(step, step + 1))
            uri = shared / precision / f"chain-{step + 1}"
            state = save(engine, uri, step + 1)
        answers[precision] = difference(state, plain_torch(STEPS)[0])
    return answers


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds checkpoints of one process (this one) after two steps, at stage 3, for the two ranks to continue."""
    folder = tmp_path_factory.mktemp("zero")
    for precision in PRECISIONS:
        engine = new_engine(0, 3, precision)
        train(engine, range(2))
        save(engine, folder / precision / "two", 2)
    return folder


@pytest.fixture(scope="module")
def answers(run_ranks: Callable[..., list[Any]], shared: Path) -> dict[str, Any]:
    first, second = run_ranks(all_cases, 2, shared)
    assert first == second  # norms, skipped steps and states are the same on every rank
    return first  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_training_is_plain_adamw_on_the_global_batch(answers: dict[str, Any], stage: int, precision: str) -> None:
    found = answers[f"{stage} {precision}"]
    assert found["norms"] < {"fp32": 1e-5, "bf16": 0.05}[precision]
    assert_close(found["truth"], precision)
    assert_close(found["accumulated"], precision)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_computes_in_bf16_and_updates_in_fp32(answers: dict[str, Any], stage: int) -> None:
    assert answers[f"{stage} bf16"]["computes in"] == "torch.bfloat16"
    assert answers[f"{stage} fp32"]["computes in"] == "torch.float32"
    assert answers[f"{stage} bf16"]["weights beyond bf16"] > 0.9


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_continuing_is_going_on(answers: dict[str, Any], stage: int, precision: str) -> None:
    assert answers[f"{stage} {precision}"]["resumed"] == SAME


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_fragments_cover_every_element_once(answers: dict[str, Any], stage: int, precision: str) -> None:
    for name, numel, slices in answers[f"{stage} {precision}"]["coverage"]:
        position = 0
        for start, length in slices:
            assert start == position, name
            position += length
        assert position == numel, name


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_changes_nothing(answers: dict[str, Any], stage: int) -> None:
    found = answers[f"{stage} not finite"]
    assert found["norm"] == "inf"
    assert found["change"] == SAME
    assert_close(found["recovered"], "fp32")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stages_and_worker_counts_can_change_on_the_way(answers: dict[str, Any], shared: Path, precision: str) -> None:
    """1 process at stage 3, 2 processes at stages 1, 3 and 2, then 1 process at stage 0: as if nothing had changed."""
    assert_close(answers["chain"][precision], precision)
    engine = new_engine(9, 0, precision)
    checkpoint.load(opened(shared / precision / f"chain-{STEPS}"), engine)
    assert engine.steps == STEPS
    train(engine, range(STEPS, STEPS + 1))
    assert_close(difference(save(engine, shared / precision / "end", STEPS + 1), plain_torch(STEPS + 1)[0]), precision)


def test_export_of_two_ranks_loads_into_the_plain_module(answers: dict[str, Any], shared: Path) -> None:
    truth, _ = plain_torch(STEPS)
    model = Tiny()
    model.load_state_dict(full_state_dict(opened(shared / "fp32" / f"chain-{STEPS}")))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), truth[f"ema/{name}"], atol=5e-6, rtol=0)


def test_nothing_is_compiled(answers: dict[str, Any]) -> None:
    assert answers["compiled"] is False


def test_the_cases_have_two_groups_and_clip() -> None:
    assert [len(group["params"]) for group in parameter_groups(Tiny(), 0.1)] == [3, 6]
    assert min(plain_torch(STEPS)[1]) > OPTIMIZER.grad_clip
