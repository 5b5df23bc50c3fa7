"""The benchmarks run, compare like with like, and their page says what was measured. No time is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import diffusers_peer, networks, report, unclip_side
from benchmarks.common import MatrixRate, PeakMemory, flops, parameter_count
from benchmarks.inputs import Inputs
from benchmarks.shapes import PARAMETER_TOLERANCE, PRECISIONS, SHAPES, STEPS
from benchmarks.worker import prepare, step_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("row", SHAPES["cpu"])
def test_networks_have_the_same_number_of_parameters(size: str, row: str) -> None:
    shape = SHAPES[size][row]
    with torch.device("meta"):
        ours = parameter_count(unclip_side.build(shape).module)
        theirs = parameter_count(diffusers_peer.build(shape).module)
    assert theirs == pytest.approx(ours, rel=PARAMETER_TOLERANCE)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("row", SHAPES["tiny"])
def test_training_steps_reach_every_parameter(row: str, precision: str) -> None:
    shape = SHAPES["tiny"][row]
    for implementation in (unclip_side, diffusers_peer):
        side = implementation.build(shape)
        prepare(side, precision, CPU, "eager")
        step_of(side, Inputs.draw(shape, "train", CPU), "train", precision)()
        unreached = [name for name, parameter in side.module.named_parameters() if parameter.grad is None]
        # diffusers keeps the statistics of the embeddings among the parameters.
        assert all(name.startswith("clip_") for name in unreached)


def _work(row: str, step: str) -> tuple[int, int]:
    """FLOPs of our step and of diffusers'."""
    shape = SHAPES["tiny"][row]
    inputs = Inputs.draw(shape, step, CPU)
    ours, theirs = (
        flops(step_of(implementation.build(shape), inputs, step, "fp32"))
        for implementation in (unclip_side, diffusers_peer)
    )
    return ours, theirs


@pytest.mark.parametrize("row", ["decoder", "upsampler_256", "upsampler_1024"])
def test_training_steps_do_the_same_work(row: str) -> None:
    ours, theirs = _work(row, "train")
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize(("row", "step"), [("decoder", "sample"), ("prior", "sample"), ("prior", "train")])
def test_work_that_nothing_needs_is_left_out(row: str, step: str) -> None:
    """What a request has computed, and in the prior's last block the positions that nothing reads."""
    ours, theirs = _work(row, step)
    assert ours < theirs


def test_flops_are_those_of_the_definition() -> None:
    left, right = torch.randn(3, 5), torch.randn(5, 7)
    assert flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert MatrixRate(CPU, torch.float32, size=64)() > 0


def test_peak_memory_is_that_of_the_steps_alone() -> None:
    megabyte = 2**20
    torch.ones(200 * megabyte, dtype=torch.uint8)  # a passing peak before, as while a network is built
    memory = PeakMemory(CPU)
    torch.ones(100 * megabyte, dtype=torch.uint8)
    assert memory.bytes() == pytest.approx(100 * megabyte, rel=0.1)


def test_a_run_measures_in_processes_of_its_own_and_writes_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--size tiny --device cpu --rows decoder --precisions fp32 --variants eager --rounds 2"
    networks.main([*arguments.split(), "--results", str(tmp_path)])
    (path,) = tmp_path.glob("networks-tiny-*.json")
    run = json.loads(path.read_text())
    assert [cell["step"] for cell in run["cells"]] == list(STEPS)
    for cell in run["cells"]:
        assert set(cell["sides"]) == {"unclip", "diffusers"}
        assert len(cell["matrix_flops_per_second"]) == 2
        for facts in cell["sides"].values():
            assert len(facts["seconds"]) == 2
            assert min(facts["seconds"]) > 0
            assert facts["flops"] > 0
            assert facts["weight_bytes"] == 4 * facts["parameters"]
    assert report.table(run) in capsys.readouterr().out
    assert report.table(run) in report.page(report.newest(tmp_path))


def _cell(ours: float, *, precision: str = "fp32", peak: int = 70) -> dict[str, object]:
    def side(seconds: float, peak_bytes: int) -> dict[str, object]:
        return {"seconds": [9.0, seconds, 0.0], "flops": 100, "peak_bytes": peak_bytes, "version": "1"}

    sides = {"unclip": side(ours, peak), "diffusers": side(1.1, 100), "dalle2-pytorch": side(1.5, 1)}
    what = {"row": "decoder", "step": "train", "precision": precision, "variant": "eager", "batch": 2, "pixels": 64}
    return {**what, "matrix_flops_per_second": [1.0, 105.0, 900.0], "sides": sides}


def test_the_page_judges_medians_by_the_aims() -> None:
    assert report.missed(_cell(1.0)) == []
    assert report.missed(_cell(1.2)) == ["share ≥ 0.92", "faster than diffusers", "≤ 0.7 of dalle2-pytorch"]
    assert report.missed(_cell(1.04, peak=90)) == ["share ≥ 0.92", "memory ≤ 0.8"]
    assert report.missed(_cell(1.04, precision="bf16")) == []
    assert "| decoder train | 2 x 64 px | fp32 | 1000 | 0.95 | 1100 | 0.87 | 0.91 | 0.70 |" in report.line(_cell(1.0))


def test_the_documentation_shows_the_committed_results() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.newest(report.RESULTS))
