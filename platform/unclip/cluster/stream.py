"""The training stream: Ray Data reads, shuffles, decodes and embeds records, and every worker gets its rows of each step.

The order of samples is `RunOrder`'s, exactly, for any number of workers: global batch k is made of the positions
k*B to (k+1)*B - 1, of which worker r gets the r-th part. Ray Data knows nothing of that; it moves *units*. A unit is one
row of the dataset and one block: a worker's rows of a few steps in a row, first as the encoded records (an Arrow IPC
message), then as arrays. Since blocks keep their order and are dealt out one by one, unit i goes to worker i mod N.
Workers check the positions that they get all the same.

Operators: number the chunks -> read each (I/O) -> decode each unit (CPU) -> embed (optional, CLIP actors).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback

from unclip.data.batches import Batch, BatchSpec, make_batch
from unclip.data.manifest import Manifest, read_slices
from unclip.data.order import RunOrder

if TYPE_CHECKING:
    import torch
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

UNIT_ROWS = 64
"""Rows a unit is filled up to with further steps, where one step gives a worker fewer: a unit costs Ray milliseconds."""
PREFETCH_UNITS = 2
"""Units that a worker holds ahead of the one it trains on."""
_CALM_S = 0.02
_UNITS_AHEAD_OF_READER = 16


class StreamError(RuntimeError):
    """A worker got other samples than its step is made of, or none."""


@dataclass(frozen=True)
class ClipPool:
    """Frozen CLIPs in the stream.

    Args:
        source: what `load_clip` takes.
        actors: how many work at once.
        gpus: GPUs of each; 0 for one CPU each.
    """

    source: str
    actors: int = 1
    gpus: float = 0.0


@dataclass(frozen=True)
class StreamPlan:
    """What to stream: a part of a run's order, for a number of workers. Picklable.

    Args:
        manifest: where the records are.
        order: the run's order over that manifest's fragments.
        spec: what to make of a record.
        num_workers: workers that share every global batch equally.
        start_position: first sample, a multiple of the global batch size: what the run has trained on so far.
        stop_position: sample after the last, a multiple of the global batch size.
        data_cpus: tasks that decode at once.
        clip: makes the embeddings in the stream; needs the CLIP fields of `spec`.
    """

    manifest: Manifest
    order: RunOrder
    spec: BatchSpec
    num_workers: int
    start_position: int
    stop_position: int
    data_cpus: int = 1
    clip: ClipPool | None = None

    def __post_init__(self) -> None:
        batch = self.order.global_batch_size
        if batch % self.num_workers:
            raise ValueError(f"global_batch_size = {batch} must be a multiple of num_workers = {self.num_workers}")
        if self.start_position % batch or self.stop_position % batch:
            raise ValueError(
                f"start_position = {self.start_position} and stop_position = {self.stop_position} must be multiples of "
                f"global_batch_size = {batch}"
            )
        if not 0 <= self.start_position < self.stop_position:
            raise ValueError(f"positions {self.start_position} to {self.stop_position}: nothing to stream")

    @property
    def rank_batch_size(self) -> int:
        """Rows of a worker in a step."""
        return self.order.global_batch_size // self.num_workers

    @property
    def steps_per_unit(self) -> int:
        return max(1, UNIT_ROWS // self.rank_batch_size)


def build_dataset(plan: StreamPlan) -> ray.data.Dataset:
    """The stream as a lazy dataset whose rows are units; to be dealt out by `streaming_split(num_workers, equal=True)`.

    Bounded: chunks are numbered one by one as they are read, so a run may have any number of them.
    """
    chunks = range(plan.order.chunk_of(plan.start_position), plan.order.chunk_of(plan.stop_position - 1) + 1)
    with DataContext.current(_data_context()):
        dataset = ray.data.from_items([{"run": 0}])
        dataset = dataset.map_batches(partial(_number, chunks=chunks), batch_size=None, num_cpus=0)
        dataset = dataset.map_batches(
            partial(_read, plan=plan),
            batch_size=None,
            num_cpus=0.001,  # waits for storage most of the time; not 0, which would be fused with the numbering
            compute=TaskPoolStrategy(size=2),  # the next chunk is read while one is decoded
        )
        dataset = dataset.map_batches(
            partial(_decode, plan=plan),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            compute=TaskPoolStrategy(size=plan.data_cpus),
        )
        if plan.clip is not None:
            dataset = dataset.map_batches(
                _ClipActor,
                fn_constructor_args=(plan.clip,),
                batch_size=None,
                compute=ActorPoolStrategy(size=plan.clip.actors),
                **({"num_gpus": plan.clip.gpus} if plan.clip.gpus else {"num_cpus": 1}),
            )
    return dataset


def execution_options() -> ExecutionOptions:
    """What the exact order depends on; Ray Train sets a dataset's options anew and must be given these."""
    return ExecutionOptions(preserve_order=True)


def batches(
    shard: ray.data.DataIterator, plan: StreamPlan, rank: int, *, pin_memory: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Worker `rank`'s rows of one step after the other, from `plan.start_position` to `plan.stop_position`.

    Each is a dict of contiguous CPU tensors with `plan.rank_batch_size` rows, as `make_batch` names and types them.
    Raises `StreamError` where the stream gives other samples than the step is made of, or ends early.
    """
    size, batch = plan.rank_batch_size, plan.order.global_batch_size
    position = plan.start_position
    for unit in shard.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=PREFETCH_UNITS):
        arrays = {name: array[0] for name, array in unit.items()}
        for start in range(0, len(arrays["position"]), size):
            rows = {name: array[start : start + size] for name, array in arrays.items()}
            expected = position + rank * size + np.arange(size)
            if not np.array_equal(rows["position"], expected):
                raise StreamError(
                    f"worker {rank} expected positions {expected[0]} to {expected[-1]}, got {rows['position'].tolist()}"
                )
            yield {name: _to_tensor(array, pin_memory=pin_memory) for name, array in rows.items()}
            position += batch
    if position != plan.stop_position:
        raise StreamError(f"worker {rank}: the stream ended at position {position} of {plan.stop_position}")


def _to_tensor(array: np.ndarray[Any, Any], *, pin_memory: bool) -> torch.Tensor:
    """A copy outside Ray's shared memory, which is read-only and has to be freed for what comes next."""
    import torch  # here, since tasks that read and decode import this module and do without torch

    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    tensor = torch.empty(array.shape, dtype=dtype, pin_memory=pin_memory)
    tensor.numpy()[...] = array
    return tensor


def _number(_: Batch, chunks: range) -> Iterator[Batch]:
    """One row, hence one block and one task downstream, for each chunk; Ray asks for the next when it wants it."""
    for index in chunks:
        yield {"chunk": np.array([index])}


def _read(numbers: Batch, plan: StreamPlan) -> Iterator[pa.Table]:
    """The units of a chunk, their records still encoded."""
    for index in numbers["chunk"]:
        chunk = plan.order.chunk(int(index))
        records = read_slices(plan.manifest, chunk.slices, plan.spec.columns())
        first = max(plan.start_position, chunk.first_position) - chunk.first_position
        last = min(plan.stop_position - chunk.first_position, chunk.rows)
        for rows in _units(first, last, plan):
            unit = records.take(chunk.permutation[rows])
            unit = unit.append_column("position", pa.array(chunk.first_position + rows))
            yield pa.table({"records": _serialise(unit)})


def _units(first: int, last: int, plan: StreamPlan) -> Iterator[np.ndarray[Any, Any]]:
    """Row numbers of each unit between two steps' ends: worker 0's, worker 1's, … of a few steps, then of the next few."""
    batch = plan.order.global_batch_size
    for start in range(first, last, batch * plan.steps_per_unit):
        stop = min(start + batch * plan.steps_per_unit, last)
        steps = np.arange(start, stop).reshape(-1, plan.num_workers, plan.rank_batch_size)
        for rank in range(plan.num_workers):
            yield steps[:, rank].reshape(-1)


def _serialise(table: pa.Table) -> pa.Array:
    """The table as the only value of a large_binary array."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, content.size], dtype=np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, content])


def _decode(units: pa.Table, plan: StreamPlan) -> Iterator[Batch]:
    """Encoded units to arrays."""
    for unit in units.column("records"):
        records = pa.ipc.open_stream(unit.as_buffer()).read_all()
        batch = make_batch(records, records.column("position").to_numpy(), plan.spec, plan.order.seed)
        yield {name: array[np.newaxis] for name, array in batch.items()}


class _ClipActor:
    """Units in, the same units with CLIP's embeddings out."""

    def __init__(self, pool: ClipPool) -> None:
        from unclip.data.embedding import ClipEmbedStage

        self.stage = ClipEmbedStage(pool.source, device="cuda" if pool.gpus else "cpu")
        self.stage.setup()

    def __call__(self, unit: Batch) -> Batch:
        (unit_arrays,) = _rows(unit)
        return {name: array[np.newaxis] for name, array in self.stage.process(unit_arrays).items()}


def _rows(units: Batch) -> Iterable[Batch]:
    for index in range(len(units["position"])):
        yield {name: array[index] for name, array in units.items()}


def _data_context() -> DataContext:
    """Settings of the stream's own execution; the process's settings stay as they are."""
    context = DataContext.get_current().copy()
    context.execution_options = execution_options()
    context.target_max_block_size = 1  # every unit a block of its own, handed on as soon as it is there
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None
    context._max_num_blocks_in_streaming_gen_buffer = _UNITS_AHEAD_OF_READER
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _CalmExecutor]
    return context


class _CalmExecutor(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest while workers have something to take.

    With its buffers full the loop spins without a pause, and takes half a core from training on a small machine.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        if not executor._consumer_idling():
            time.sleep(_CALM_S)
