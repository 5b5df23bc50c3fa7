"""One side of one measurement in a process of its own, so that its memory is its own: it runs steps when asked to.

`python -m benchmarks.worker` takes its side's module from the command line, writes a line of JSON when it is warm, and then
answers each line `seconds` or `flops` on its standard input with one number, until that closes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import TextIO

import torch
from benchmarks.common import PeakMemory, Run, flops, parameter_count, seconds, version
from benchmarks.inputs import Inputs, Side
from benchmarks.shapes import PRECISIONS, SHAPES, STEPS, VARIANTS

_WARM_UP = 1


@dataclass(frozen=True)
class Ready:
    """What a worker says when it is warm; `peak_bytes` is beyond the weights, while it took its first steps."""

    package: str
    version: str
    torch: str
    parameters: int
    weight_bytes: int
    peak_bytes: int


def step_of(side: Side, inputs: Inputs, step: str, precision: str) -> Run:
    """The measured step.

    train: gradients dropped, forward pass, mean squared error to a fixed target, backward pass; no optimiser, no data.
    sample: one evaluation of the network without gradients, guided for decoder and prior; what a request computes once
    lies outside.
    bf16 is a module whose weights are bfloat16, autocast one with float32 weights under `torch.autocast`.
    """
    device, module = inputs.x_t.device, side.module
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()

    def train() -> None:
        module.zero_grad(set_to_none=True)
        with autocast:
            output = side.predict(inputs)
        torch.nn.functional.mse_loss(output.float(), inputs.target).backward()

    if step == "train":
        return train
    module.eval().requires_grad_(False)
    with torch.no_grad(), autocast:
        denoise = side.request(inputs)

    def sample() -> None:
        with torch.no_grad(), autocast:
            denoise()

    return sample


def prepare(side: Side, precision: str, device: torch.device, variant: str) -> None:
    """Puts the network where and into the form in which it is measured."""
    side.module.to(device)
    if precision == "bf16":
        side.module.to(torch.bfloat16)
    if device.type == "cuda":
        side.module.to(memory_format=torch.channels_last)
    if variant == "compiled":
        side.module.compile(dynamic=False)


def captured(run: Run) -> Run:
    """`run` as one CUDA graph, which is replayed; for steps without gradients."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def main() -> None:
    arguments = _arguments()
    answers = _own_stdout()
    device, shape = torch.device(arguments.device), SHAPES[arguments.size][arguments.row]
    implementation = importlib.import_module(f"benchmarks.{arguments.side}")
    side: Side = implementation.build(shape, arguments.parameters)
    prepare(side, arguments.precision, device, arguments.variant)
    inputs = Inputs.draw(shape, arguments.step, device)
    memory = PeakMemory(device)
    eager = step_of(side, inputs, arguments.step, arguments.precision)
    run = captured(eager) if arguments.variant == "graph" else eager
    for _ in range(_WARM_UP):
        run()
    ready = Ready(
        package=implementation.PACKAGE,
        version=version(implementation.PACKAGE),
        torch=torch.__version__,
        parameters=parameter_count(side.module),
        weight_bytes=sum(parameter.nbytes for parameter in side.module.parameters()),
        peak_bytes=memory.bytes(),
    )
    print(json.dumps(asdict(ready)), file=answers, flush=True)
    for line in sys.stdin:
        answer = seconds(run, device) if line.strip() == "seconds" else flops(eager)
        print(json.dumps(answer), file=answers, flush=True)


def _own_stdout() -> TextIO:
    """The standard output, for answers alone: what libraries print goes to the standard error from here on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", required=True, help="module of benchmarks/ with `build` and `PACKAGE`")
    parser.add_argument("--size", required=True, choices=SHAPES)
    parser.add_argument("--row", required=True)
    parser.add_argument("--step", required=True, choices=STEPS)
    parser.add_argument("--precision", required=True, choices=PRECISIONS)
    parser.add_argument("--variant", required=True, choices=VARIANTS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--parameters", required=True, type=int, help="what a peer's network is fitted to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
