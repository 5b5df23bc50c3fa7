"""Bytes by part, against closed forms, the ZeRO paper's figures, and arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest

from unclip.planning.activations import StepMemory, count_step_memory
from unclip.planning.memory import Shape, worker_memory
from unclip.planning.network import Network, count_network
from unclip.planning.traffic import Links, step_traffic
from unclip.recipes import RECIPES
from unclip.training.engine import ZeroConfig
from unclip.training.flops import with_checkpointing

BILLION = 10**9


def network(parameters: int, *, activations: float = 0.0) -> Network:
    """One whose pass holds `activations` bytes a sample at first, and at last all gradients."""
    gradients = np.array([0.0, 4.0 * parameters])
    step = StepMemory(np.zeros(2), np.array([activations, 0.0]), gradients)
    return Network(parameters, low_parameters=0, largest=parameters // 100, flops=1e12, step=step)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)],
)
def test_state_of_7_5_billion_parameters_on_64_workers(stage: int, expected: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 2 + 2 + 12 bytes a parameter; ours has 4 more, of the moving average."""
    parameters, workers = 7_500_000_000, 64
    precision = "bf16" if stage else "fp32"  # stage 0 updates its float32 weights in place: 4 + 4 + 8
    memory = worker_memory(network(parameters), Shape(ZeroConfig(stage=stage, precision=precision), workers, 1))  # type: ignore[arg-type]
    device = memory.device
    assert sum(device[name] for name in ("weights", "optimizer")) / BILLION + (
        2 * 7.5 / (64 if stage > 1 else 1) if stage else 4 * 7.5
    ) == pytest.approx(expected, abs=0.05)
    assert device["ema"] == pytest.approx(4 * parameters / (workers if stage else 1))


def test_gradients_of_accumulated_micro_batches_are_there_throughout() -> None:
    net = network(BILLION, activations=30e9)
    once, twice = (worker_memory(net, Shape(ZeroConfig(stage=1, precision="fp32"), 8, 1, n)) for n in (1, 2))
    assert once.device["gradients"] == 0  # the fullest moment is before the first of them
    assert twice.device["gradients"] == 4 * BILLION


def test_offload_moves_state_off_the_device() -> None:
    net = network(BILLION)
    here = worker_memory(net, Shape(ZeroConfig(stage=2, precision="bf16"), 4, 1))
    away = worker_memory(net, Shape(ZeroConfig(stage=2, precision="bf16", offload_optimizer="cpu"), 4, 1))
    assert away.device["optimizer"] == away.device["ema"] == 0
    assert away.host["optimizer"] == here.device["optimizer"]
    assert away.host["ema"] == here.device["ema"]
    assert away.total < here.total


def test_disks_take_what_is_swapped_out() -> None:
    zero = ZeroConfig(stage=3, precision="bf16", offload_optimizer="nvme", nvme_path="/nvme")
    memory = worker_memory(network(BILLION), Shape(zero, 4, 1))
    assert memory.disk == 16 * BILLION / 4
    assert "optimizer" not in memory.host


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_sent_in_a_step(stage: int) -> None:
    """Of P bytes of weights: 2P for an all-reduce of gradients, P for a gather; stage 3 gathers twice and scatters once."""
    parameters, workers = 1000, 4
    shape = Shape(ZeroConfig(stage=stage, precision="fp32"), workers, 1, 2)  # type: ignore[arg-type]
    sent = sum(each.sent(workers) for each in step_traffic(network(parameters), shape))
    whole = 4 * parameters * (workers - 1) / workers
    micro_batches = 2
    expected = {0: 2, 1: 3, 2: 2 * micro_batches + 1, 3: 3 * micro_batches}[stage]
    assert sent == pytest.approx(expected * whole)


def test_nothing_is_sent_by_one_worker() -> None:
    assert step_traffic(network(1000), Shape(ZeroConfig(stage=3, precision="fp32"), 1, 1)) == []


def test_links_are_used_within_nodes_first() -> None:
    shape = Shape(ZeroConfig(stage=0, precision="fp32"), 16, 1)
    (collective,) = step_traffic(network(BILLION), shape)
    seconds = Links(node=400e9, cluster=50e9, per_node=8).seconds(collective, 16)
    assert seconds == pytest.approx(2 * 4e9 * 7 / 8 / 400e9 + 2 * 4e9 / 8 / 2 / 50e9)


def test_activations_are_straight_lines_of_the_batch() -> None:
    config = RECIPES["decoder"]["debug"]().merged({"zero": {"precision": "fp32"}})
    counted = count_step_memory(config)
    few, many = (counted.peak(samples, kept=0.0).activations for samples in (8, 64))
    assert many == pytest.approx(8 * few, rel=0.02)


def test_checkpointing_keeps_less() -> None:
    config = RECIPES["prior"]["small"]()
    plain, again = (
        count_network(with_checkpointing(config, enabled=enabled)).step.peak(64, kept=0.0) for enabled in (False, True)
    )
    assert again.activations < 0.4 * plain.activations


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("autocast", 4), ("bf16", 2)])
@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_gradients_are_as_wide_as_weights(stage: str, precision: str, width: int) -> None:
    config = RECIPES[stage]["demo"]().merged({"zero": {"precision": precision, "stage": 1}})
    counted = count_network(config)
    whole = width * counted.parameters
    assert counted.step.gradients[-1] == pytest.approx(whole, rel=0.02)  # small ones are rounded up


@pytest.mark.parametrize(("precision", "stages"), [("fp32", (0, 1, 2)), ("autocast", (0, 1, 2)), ("bf16", (1, 2))])
def test_one_worker_exchanges_nothing(precision: str, stages: tuple[int, ...]) -> None:
    """Stages 1 and 2 are stage 0 there, as the engine has it, but where bfloat16 weights need float32 ones beside them."""
    net = network(BILLION)
    zeros = [ZeroConfig.from_dict({"stage": stage, "precision": precision}) for stage in stages]
    whole = {worker_memory(net, Shape(zero, 1, 1), lazy=True).total for zero in zeros}
    assert len(whole) == 1
    if precision == "fp32":
        assert whole == {(4 + 4 + 8 + 4) * BILLION}  # weights, gradients, moments, average


def test_stage_3_keeps_the_buffer_of_its_gradients() -> None:
    """DeepSpeed adds them up in a flat one, which is there in the next forward pass too."""
    net = network(BILLION, activations=40e9)
    kept = [
        worker_memory(net, Shape(ZeroConfig.from_dict({"stage": stage, "precision": "fp32"}), 4, 1), lazy=True)
        for stage in (2, 3)
    ]
    assert [memory.device["gradients"] for memory in kept] == [0.0, BILLION]


def test_offload_copies_weights_back_through_host_memory() -> None:
    """Before stage 3; stage 3 has the gradients there in both types."""
    net = network(BILLION)
    two, three = (
        worker_memory(
            net, Shape(ZeroConfig.from_dict({"stage": stage, "precision": "bf16", "offload_optimizer": "cpu"}), 4, 1)
        ).host
        for stage in (2, 3)
    )
    assert two["buffers"] - three["buffers"] == 2 * BILLION / 4 - 2 * net.largest
    assert three["gradients"] - two["gradients"] == 2 * BILLION / 4


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_on_their_way_to_the_host(stage: int) -> None:
    """Float32 alone, as measured: weights, their copy on the way back, 16 bytes of state, gradients here and there; and of
    the largest one two buffers, and 8 bytes for its norm. Stage 2 adds micro-batches up in one more copy."""
    net = network(100_000_000)
    zero = ZeroConfig.from_dict({"stage": stage, "precision": "fp32", "offload_optimizer": "cpu"})
    once, twice = (worker_memory(net, Shape(zero, 1, 1, n), lazy=True).total for n in (1, 2))
    assert once == (4 + 4 + 16 + 4 + 4) * net.parameters + (4 + 4 + 8) * net.largest
    assert twice - once == (4 * net.parameters if stage == 2 else 0)
