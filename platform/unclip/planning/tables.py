"""A plan for people: aligned tables, and what they assume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from unclip.planning.assumptions import PlanConfig
from unclip.planning.estimate import Step, limit_bytes, links
from unclip.planning.memory import PARTS
from unclip.planning.planner import Planner, Run
from unclip.utils.hardware import GPUS

GIB = 2**30


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table, the first column to the left, the others to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = [row[0].ljust(widths[0])]
        yield "  ".join(cells + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]).rstrip()


def report(planner: Planner, chosen: Run) -> Iterator[str]:
    """The whole plan."""
    plan, network = planner.plan, planner.network
    zero = planner.config.zero
    yield (
        f"{plan.stage} of recipe {plan.recipe}: {network.parameters / 1e6:,.0f}M parameters, "
        f"{network.flops / 1e12:,.3g} TFLOP a sample (forward and backward), {zero.precision}, "
        f"{plan.gpus} x {plan.gpu}, global batch {planner.batch}, {planner.max_steps:,} steps"
    )
    yield ""
    yield f"Memory of a GPU in GiB, of {limit_bytes(plan) / GIB:.1f} that may be used, with the largest micro-batch that fits"
    yield from _stages(planner)
    yield ""
    yield f"A step at ZeRO stage {zero.stage}"
    yield from _chosen(planner, chosen)
    yield ""
    yield "Scaling, the global batch as it is"
    yield from curve_table(planner.curve())
    yield ""
    yield "Assumed"
    yield from (f"  {line}" for line in assumptions(plan))


def _stages(planner: Planner) -> Iterator[str]:
    header = ["ZeRO stage", *PARTS, "total", "host", "micro-batch", "s/step", "images/s"]
    yield from aligned(header, [_stage_row(planner, stage, step) for stage, step in planner.stages()])


def _stage_row(planner: Planner, stage: int, step: Step | None) -> list[str]:
    if step is not None:
        shown, ending = step, [str(step.shape.microbatch), f"{step.seconds:.3g}", f"{step.samples / step.seconds:,.0f}"]
    else:
        zero = planner.config.zero.merged({"stage": stage})
        shown, ending = planner.step(zero, planner.plan.gpus, planner.plan.microbatch or 1), ["none", "", ""]
    memory = shown.memory
    sizes = [*(memory.device[name] for name in PARTS), memory.total, sum(memory.host.values())]
    return [str(stage), *(f"{size / GIB:.1f}" for size in sizes), *ending]


def _chosen(planner: Planner, run: Run) -> Iterator[str]:
    step, plan = run.step, planner.plan
    shape = step.shape
    yield from aligned(
        ["", ""],
        [
            ["  micro-batch x accumulation", f"{shape.microbatch} x {shape.accumulation}"],
            ["  fullest moment", step.memory.moment],
            ["  computing s", f"{step.computing:.3f}"],
            ["  communication s (not hidden)", f"{step.communicating:.3f} ({step.waiting:.3f})"],
            ["  update s", f"{step.updating:.3f}"],
            ["  step s", f"{step.seconds:.3f}"],
            ["  images/s", f"{run.images_per_second:,.0f}"],
            ["  MFU", f"{run.mfu:.1%}"],
            ["  days for all steps", f"{run.days:,.1f}"],
            ["  cost, thousand US dollars", f"{run.cost / 1000:,.0f}"],
            ["  data MB/s", f"{run.megabytes_per_second:,.0f}"],
            [f"  CPU nodes of {plan.node_cores} cores for data", str(run.data_nodes)],
        ],
    )


def curve_table(curve: Sequence[Run]) -> Iterator[str]:
    """A line for each number of GPUs; efficiency is images/s of a GPU over those of the first line."""
    header = [
        "GPUs",
        "micro-batch",
        "accumulation",
        "s/step",
        "images/s",
        "efficiency",
        "days",
        "thousand $",
        "data nodes",
    ]
    rows = []
    for run, efficiency in zip(curve, efficiencies(curve), strict=True):
        shape = run.step.shape
        rows.append(
            [
                str(shape.workers),
                str(shape.microbatch),
                str(shape.accumulation),
                f"{run.step.seconds:.3g}",
                f"{run.images_per_second:,.0f}",
                f"{efficiency:.2f}",
                f"{run.days:,.1f}",
                f"{run.cost / 1000:,.0f}",
                str(run.data_nodes),
            ]
        )
    yield from aligned(header, rows)


def efficiencies(curve: Sequence[Run]) -> list[float]:
    """Images/s of a GPU, over those of the smallest number of GPUs."""
    rates = [run.images_per_second / run.step.shape.workers for run in curve]
    return [rate / rates[0] for rate in rates]


def assumptions(plan: PlanConfig) -> Iterator[str]:
    """What the figures rest on, line by line."""
    gpu, wires = GPUS[plan.gpu], links(plan)
    price = gpu.price if plan.price is None else plan.price
    yield f"{gpu.name}: {gpu.peaks['bf16'] / 1e12:g} TFLOP/s in bfloat16, {gpu.peaks['fp32'] / 1e12:g} in float32, dense"
    yield f"{plan.utilization:.0%} of that while computing; activation checkpointing takes a third more work"
    yield f"{gpu.memory / GIB:g} GiB of memory, of which {plan.margin:.0%} stay free; 1.5 GiB for CUDA and its libraries"
    yield (
        f"{wires.node / 1e9:.3g} GB/s to GPUs of the node ({wires.per_node} of them), {wires.cluster / 1e9:.3g} GB/s to other "
        f"nodes, one way, {plan.link_efficiency:.0%} of the links' rate; no latency"
    )
    yield f"stage 3 hides communication behind {plan.overlap:.0%} of its computing, the other stages hide none"
    yield f"${price:.2f} for an hour of a GPU; nothing for CPU nodes, storage, failures or evaluation"
    yield f"{plan.record_kb:g} kB a record; {plan.core_images:g} records/s a core in the data stream"
