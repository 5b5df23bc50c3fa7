"""Pictures a second from shards to batches: ours from Parquet and from tar, webdataset, mosaicml-streaming, the decoder.

    python -m benchmarks.data.loading --peer-python /tmp/peers/bin/python

Sides run in turn, each in a process of its own, with 1 and 2 workers that decode; medians of `--rounds`. The peers run in an
environment of their own (`pip install webdataset mosaicml-streaming open_clip_torch`, the same PyTorch and Pillow as here).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
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
from benchmarks.common import machine, version, write_json
from benchmarks.data.loading_data import WRITERS
from benchmarks.data.loading_side import FORMATS, SIDES, TASKS

_ROOT = Path(__file__).resolve().parents[2]
_PEERS = ("webdataset", "streaming")


def prepare(folder: Path, count: int, peer_python: str | None) -> None:
    """Writes the same pictures in every format that is missing."""
    for name in WRITERS:
        interpreter = peer_python if name == "mds" else sys.executable
        if interpreter is not None and not (folder / name).exists():
            code = (
                "from pathlib import Path; from benchmarks.data.loading_data import WRITERS; "
                f"WRITERS[{name!r}](Path({str(folder / name)!r}), {count})"
            )
            subprocess.run([interpreter, "-c", code], cwd=_ROOT, check=True)


def run(side: str, interpreter: str, folder: Path, *, workers: int, task: str, seconds: float) -> dict[str, float]:
    """One measurement of one side."""
    options = {"side": side, "folder": folder, "workers": workers, "task": task, "seconds": seconds}
    command = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in options.items())
    environment = os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT / 'platform'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [interpreter, "-m", "benchmarks.data.loading_side", *command],
        cwd=_ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each task and number of workers, medians, ratios to the better peer and to the decoder."""
    lines = [
        "| task | workers | "
        + " | ".join(SIDES)
        + " | Parquet / better peer | tar / better peer | Parquet / decoder |",
        "| --- " * (len(SIDES) + 5) + "|",
    ]
    for task, workers in dict.fromkeys((cell["task"], cell["workers"]) for cell in cells):
        rates = {
            cell["side"]: statistics.median(cell["images_per_second"])
            for cell in cells
            if (cell["task"], cell["workers"]) == (task, workers)
        }
        peer = max((rates[name] for name in _PEERS if name in rates), default=float("nan"))
        figures = " | ".join(f"{rates[side]:.0f}" if side in rates else "–" for side in SIDES)
        ratios = (rates["parquet"] / peer, rates["tar"] / peer, rates["parquet"] / rates["decode"])
        lines.append(f"| {task} | {workers} | {figures} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="Python of the peers' environment")
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "unclip-loading")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args(argv)
    prepare(arguments.folder, arguments.pictures, arguments.peer_python)
    interpreters = {side: arguments.peer_python if side in _PEERS else sys.executable for side in SIDES}
    present = {
        side: python for side, python in interpreters.items() if python and (arguments.folder / FORMATS[side]).exists()
    }
    cells = []
    for task, workers in itertools.product(arguments.tasks, arguments.workers):
        found = [
            {"task": task, "workers": workers, "side": side, "images_per_second": [], "first_batch_s": []}
            for side in present
        ]
        for _ in range(arguments.rounds):
            for cell in found:
                options = {"workers": workers, "task": task, "seconds": arguments.seconds}
                for name, value in run(cell["side"], present[cell["side"]], arguments.folder, **options).items():
                    cell[name].append(value)
        cells += found
        print(table(found), flush=True)
    date = datetime.datetime.now(datetime.UTC)
    facts = {
        "date": date.isoformat(timespec="seconds"),
        "machine": machine(torch.device("cpu")),
        "pillow": version("pillow"),
    }
    write_json(
        arguments.results / f"loading-{date:%Y-%m-%d}.json", {**facts, "pictures": arguments.pictures, "cells": cells}
    )


if __name__ == "__main__":
    main()
