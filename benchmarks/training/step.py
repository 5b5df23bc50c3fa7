"""The platform's training step against a bare PyTorch loop on tensors in memory, and two workers against one.

    python -m benchmarks.training.step --results benchmarks/results

Sides run in turn, each in a process of its own with one thread a worker; medians of `--rounds`. The platform is a whole run:
Ray Train, DeepSpeed, the stream from Parquet, moving average, metrics, TensorBoard, checkpoints at the default cadence. The bare
loop has the network, the loss and AdamW, nothing else. `bare x2` is two bare loops at once that do not know of each other:
what the machine itself loses when both cores work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import machine, write_json
from benchmarks.training.sides import prepare_records

_ROOT = Path(__file__).resolve().parents[2]
SIDES = {
    "bare": ("bare", 1, 1),
    "platform": ("platform", 1, 1),
    "bare x2": ("bare", 1, 2),
    "platform x2": ("platform", 2, 1),
}
"""What runs, with how many workers, in how many processes at once."""


def run(side: str, folder: Path, *, precision: str, steps: int) -> list[float]:
    """Images a second of each process of a side."""
    kind, workers, processes = SIDES[side]
    environment = os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT / 'platform'}", "OMP_NUM_THREADS": "1"}
    options = ["--kind", kind, "--workers", str(workers), "--precision", precision, "--steps", str(steps)]
    command = [sys.executable, "-m", "benchmarks.training.sides", *options, "--folder", str(folder)]
    running = [
        subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    answers = [process.communicate(timeout=580)[0] for process in running]
    assert all(process.returncode == 0 for process in running), side
    return [float(json.loads(answer.splitlines()[-1])["images_per_second"]) for answer in answers]


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: images a second a worker, and the ratios that are promised."""
    lines = [
        f"| precision | {' | '.join(SIDES)} | platform's step / bare | weak scaling, 1 to 2 workers | of bare loops |",
        "| --- " * (len(SIDES) + 4) + "|",
    ]
    for precision in dict.fromkeys(cell["precision"] for cell in cells):
        rates = {
            cell["side"]: statistics.median(cell["images_per_second_per_worker"])
            for cell in cells
            if cell["precision"] == precision
        }
        ratios = (
            rates["bare"] / rates["platform"],
            rates["platform x2"] / rates["platform"],
            rates["bare x2"] / rates["bare"],
        )
        figures = " | ".join(f"{rates[side]:.2f}" for side in SIDES)
        lines.append(f"| {precision} | {figures} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "autocast"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "unclip-training")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args(argv)
    prepare_records(arguments.folder)
    cells = []
    for precision in arguments.precisions:
        found: list[dict[str, Any]] = [
            {"precision": precision, "side": side, "images_per_second_per_worker": []} for side in SIDES
        ]
        for _ in range(arguments.rounds):
            for cell in found:
                rates = run(cell["side"], arguments.folder, precision=precision, steps=arguments.steps)
                workers = SIDES[cell["side"]][1]
                cell["images_per_second_per_worker"].append(statistics.mean(rates) / workers)
        cells += found
        print(table(found), flush=True)
    date = datetime.datetime.now(datetime.UTC)
    facts = {"date": date.isoformat(timespec="seconds"), "machine": machine(torch.device("cpu"))}
    write_json(arguments.results / f"training-step-{date:%Y-%m-%d}.json", {**facts, "cells": cells})


if __name__ == "__main__":
    main()
