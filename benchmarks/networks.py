"""Training and sampling steps of all four networks, ours and the peers', in one run.

    python -m benchmarks.networks [--peer-python /tmp/d2p/bin/python]

Every side of a measurement is a process of its own; runs alternate (ours, peer, ours, peer, …) with bursts of matrix products
between them. All raw figures go to one JSON file, the table to the terminal.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from benchmarks import report, unclip_side
from benchmarks.common import MatrixRate, machine, parameter_count, write_json
from benchmarks.shapes import PARAMETER_TOLERANCE, PRECISIONS, SHAPES, STEPS, VARIANTS

_ROOT = Path(__file__).resolve().parents[1]
_OURS = "unclip_side"


class Worker:
    """A `benchmarks.worker` process; a context manager that ends it."""

    def __init__(self, interpreter: str, arguments: dict[str, Any]) -> None:
        self._name = " ".join(str(value) for value in arguments.values())
        options = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in arguments.items())
        self._process = subprocess.Popen(
            [interpreter, "-m", "benchmarks.worker", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()

    def answer(self, question: str | None = None) -> Any:
        """The answer to `question`; without one, what the worker says first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if question is not None:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker for {self._name} ended; its error is above")
        return json.loads(line)


def measure(
    cell: dict[str, str], interpreters: dict[str, str], *, size: str, device: torch.device, rounds: int
) -> dict[str, Any]:
    """One row of the table: `cell` names row, step, precision and variant, `interpreters` a Python for each side."""
    shape = SHAPES[size][cell["row"]]
    with torch.device("meta"):
        parameters = parameter_count(unclip_side.build(shape).module)
    common = {"size": size, "device": device, "parameters": parameters, **cell}
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(interpreter, {"side": side, **common}))
            for side, interpreter in interpreters.items()
        }
        sides = {side: worker.answer() for side, worker in workers.items()}
        for side, facts in sides.items():
            _check_parameters(side, facts["parameters"], parameters)
            facts["flops"] = workers[side].answer("flops")
            facts["seconds"] = []
        rate = MatrixRate(device, torch.float32 if cell["precision"] == "fp32" else torch.bfloat16)
        rates = []
        for _ in range(rounds):
            rates.append(rate())
            for side, worker in workers.items():
                sides[side]["seconds"].append(worker.answer("seconds"))
    batch, pixels = shape.batch(cell["step"])
    named = {facts.pop("package"): facts for facts in sides.values()}
    return {**cell, "batch": batch, "pixels": pixels, "matrix_flops_per_second": rates, "sides": named}


def _check_parameters(side: str, count: int, ours: int) -> None:
    if abs(count - ours) > PARAMETER_TOLERANCE * ours:
        raise RuntimeError(f"{side} has {count} parameters, ours {ours}: more than {PARAMETER_TOLERANCE:.0%} apart")


def cells(arguments: argparse.Namespace) -> Iterator[dict[str, str]]:
    """What is measured; a training step is not captured as a graph."""
    for row, step, precision, variant in itertools.product(
        arguments.rows, arguments.steps, arguments.precisions, arguments.variants
    ):
        if not (step == "train" and variant == "graph"):
            yield {"row": row, "step": step, "precision": precision, "variant": variant}


def name_of(cell: dict[str, Any]) -> tuple[str, str, str, str]:
    """Row, step, precision and variant of a cell."""
    return (cell["row"], cell["step"], cell["precision"], cell["variant"])


def in_order(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells as the table shows them."""
    order = list(itertools.product(SHAPES["cpu"], STEPS, PRECISIONS, VARIANTS))
    return sorted(measured, key=lambda cell: order.index(name_of(cell)))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    device = torch.device(arguments.device)
    started = datetime.datetime.now(datetime.UTC)
    path = Path(arguments.results) / f"networks-{arguments.size}-{started:%Y-%m-%d}.json"
    results: dict[str, Any] = {
        "date": started.isoformat(timespec="seconds"),  # of the newest cells
        "size": arguments.size,
        "rounds": arguments.rounds,
        "machine": machine(device),
        "cells": json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else [],
    }
    peers = {_OURS: sys.executable, "diffusers_peer": sys.executable}
    for cell in cells(arguments):
        interpreters = dict(peers)
        if arguments.peer_python and cell["variant"] == "eager" and cell["precision"] != "bf16":
            interpreters["dalle2_pytorch_peer"] = arguments.peer_python
        result = measure(cell, interpreters, size=arguments.size, device=device, rounds=arguments.rounds)
        results["cells"] = in_order(
            [*(other for other in results["cells"] if name_of(other) != name_of(result)), result]
        )
        write_json(path, results)
        print(report.line(result), flush=True)
    print(f"\n{report.table(results)}\n\n{path}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="gpu" if cuda else "cpu")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rows", nargs="+", choices=SHAPES["cpu"], default=list(SHAPES["cpu"]))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS if cuda else ["eager"])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of every side; medians are reported")
    parser.add_argument("--peer-python", help="interpreter of the environment with dalle2-pytorch")
    parser.add_argument("--results", default=str(_ROOT / "runs" / "benchmarks"), help="folder for the JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
