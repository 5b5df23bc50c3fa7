"""The training stream: Ray Data reads, shuffles, decodes and embeds records, and every worker gets its rows of each step.

The order of samples is `RunOrder`'s, exactly, for any number of workers: global batch k is made of the positions
k*B to (k+1)*B - 1, of which worker r gets the r-th part. Ray Data knows nothing of that; it moves *units*. A unit is one
row of the dataset and one block: a worker's rows of a few steps in a row, first as lists of encoded records, then as
arrays. Since blocks keep their order and are dealt out one by one, unit i goes to worker i mod N.
Workers check the positions that they get all the same.

Operators: read chunks (I/O) -> decode units (CPU) -> embed them (optional, CLIP actors).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions, TaskPoolStrategy
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
    ConcurrencyCapBackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback

from unclip.data.batches import Batch, BatchSpec, make_batch, warm_up
from unclip.data.embedding import MICROBATCH, ClipEmbedStage
from unclip.data.manifest import DataError, Manifest, SliceReader
from unclip.data.order import Chunk, RunOrder

if TYPE_CHECKING:
    import torch
    from ray.data._internal.execution.interfaces import PhysicalOperator
    from ray.data._internal.execution.resource_manager import ResourceManager
    from ray.data._internal.execution.streaming_executor import StreamingExecutor
    from ray.data._internal.execution.streaming_executor_state import Topology

UNIT_BYTES = 1 << 24
"""A unit is filled with further steps up to this size, since each costs Ray tens of milliseconds of CPU; encoded or decoded,
whichever is more."""
UNIT_ROWS = 512
"""And up to so many rows."""
PREFETCH_UNITS = 2
"""Units that a worker fetches ahead of the one it takes apart."""
STEPS_AHEAD = 2
"""Steps that a worker has ready, as tensors."""
CHUNKS_PER_TASK = 64
"""Chunks that a reading task goes through: bounds both the number of tasks of a long run and what a lost one repeats."""
UNITS_AHEAD = 2
"""Units that wait for each worker between two operators."""
_CLIP_CPUS = 0.99
"""Of a CLIP without a GPU. Not what decoders ask for: Ray Data would make one operator of two that ask for the same, and
the CLIP would wait while its own process decodes."""
_REST_S, _LONGEST_REST_S = 0.01, 0.16
_SOURCE = "_source"
"""Column of encoded units: the number of each record's source."""


class StreamError(RuntimeError):
    """A worker got other samples than its step is made of, or none."""


@dataclass(frozen=True)
class ClipPool:
    """Frozen CLIPs in the stream.

    Args:
        source: what `load_clip` takes.
        actors: how many work at once.
        gpus: GPUs of each; 0 for one CPU each.
        microbatch: records that pass a CLIP at once.
        text_states: whether units get the states of all tokens too, see `ClipEmbedStage.process`.
        node_labels: Ray labels of the nodes whose GPUs they take.
    """

    source: str
    actors: int = 1
    gpus: float = 0.0
    microbatch: int = MICROBATCH
    text_states: bool = False
    node_labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamPlan:
    """What to stream: a part of a run's order, for a number of workers. Picklable.

    Args:
        manifests: where the records of each source are.
        order: the run's order over those manifests' fragments.
        spec: what to make of a record.
        num_workers: workers that share every global batch equally.
        start_position: first sample, a multiple of the global batch size: what the run has trained on so far.
        stop_position: sample after the last, a multiple of the global batch size.
        data_cpus: actors that decode, on a CPU each.
        clip: makes the embeddings in the stream; needs the CLIP fields of `spec`.
    """

    manifests: tuple[Manifest, ...]
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

    def steps_per_unit(self, encoded_bytes: float) -> int:
        """Steps that a unit holds of records that take `encoded_bytes` each."""
        rows = min(UNIT_ROWS, UNIT_BYTES / max(encoded_bytes, self.spec.row_bytes, 1))
        return max(1, int(rows / self.rank_batch_size))


def build_dataset(plan: StreamPlan) -> ray.data.Dataset:
    """The stream as a lazy dataset whose rows are units; to be dealt out by `streaming_split(num_workers, equal=True)`.

    Memory is bounded: tasks wait where their units are not taken.
    """
    first, last = plan.order.chunk_of(plan.start_position), plan.order.chunk_of(plan.stop_position - 1)
    tasks = [
        {"first": start, "stop": min(start + CHUNKS_PER_TASK, last + 1)}
        for start in range(first, last + 1, CHUNKS_PER_TASK)
    ]
    with DataContext.current(data_context()):
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        dataset = dataset.map_batches(
            partial(_read, plan=plan),
            batch_size=None,
            num_cpus=0,  # it waits, for storage or for the decoders
            compute=TaskPoolStrategy(size=1),  # a second one could fill the buffers before its turn comes
        )
        dataset = dataset.map_batches(
            DecodeActor,
            fn_constructor_args=(plan.spec, plan.order.seed, [manifest.uri for manifest in plan.manifests]),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            # Not tasks: an actor has its next unit at hand, a task's CPU rests until the scheduling loop comes round.
            compute=ActorPoolStrategy(size=plan.data_cpus, max_tasks_in_flight_per_actor=2),
        )
        if plan.clip is not None:
            dataset = embed_units(dataset, plan.clip)
    return dataset


def embed_units(dataset: ray.data.Dataset, pool: ClipPool) -> ray.data.Dataset:
    """A dataset of units with CLIP's embeddings in them, as `ClipEmbedStage` makes them."""
    return dataset.map_batches(
        ClipActor,
        fn_constructor_args=(pool,),
        batch_size=None,
        compute=ActorPoolStrategy(size=pool.actors),
        **({"num_gpus": pool.gpus, "label_selector": pool.node_labels} if pool.gpus else {"num_cpus": _CLIP_CPUS}),
    )


def execution_options() -> ExecutionOptions:
    """What the exact order depends on; Ray Train sets a dataset's options anew and must be given these."""
    return ExecutionOptions(preserve_order=True)


def batches(
    shard: ray.data.DataIterator, plan: StreamPlan, rank: int, *, pin_memory: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Worker `rank`'s rows of one step after the other, from `plan.start_position` to `plan.stop_position`.

    Each is a dict of contiguous CPU tensors with `plan.rank_batch_size` rows, as `make_batch` names and types them.
    The stream starts at once, in a thread that keeps `STEPS_AHEAD` steps ready, while the caller builds its model.
    Raises `StreamError` where the stream gives other samples than the step is made of, or ends early.
    """
    ready: queue.Queue[dict[str, torch.Tensor] | BaseException | None] = queue.Queue(STEPS_AHEAD)

    def fill() -> None:
        try:
            for step in _steps(shard, plan, rank, pin_memory=pin_memory):
                ready.put(step)
            ready.put(None)
        except BaseException as error:  # raised again where the batches are used
            ready.put(error)

    threading.Thread(target=fill, name="stream", daemon=True).start()
    return _taken(ready)


def _taken(ready: queue.Queue[dict[str, torch.Tensor] | BaseException | None]) -> Iterator[dict[str, torch.Tensor]]:
    while (step := ready.get()) is not None:
        if isinstance(step, BaseException):
            raise step
        yield step


def _steps(
    shard: ray.data.DataIterator, plan: StreamPlan, rank: int, *, pin_memory: bool
) -> Iterator[dict[str, torch.Tensor]]:
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


def _read(tasks: Batch, plan: StreamPlan) -> Iterator[pa.Table]:
    """The units of a task's chunks, their records still encoded; the next chunk is read while one is handed on."""
    reader = SliceReader(plan.manifests, plan.spec.columns())
    indices = [i for a, b in zip(tasks["first"], tasks["stop"], strict=True) for i in range(a, b)]
    with ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(_records, reader, plan.order, indices[0])
        for following in [*indices[1:], None]:
            chunk, records = upcoming.result()
            if following is not None:
                upcoming = ahead.submit(_records, reader, plan.order, following)
            sizes = [sum(stop - start for _, start, stop in slices) for slices in chunk.slices]
            sources = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
            for rows in _units(chunk, plan, plan.steps_per_unit(records.nbytes / records.num_rows)):
                unit = records.take(chunk.permutation[rows])
                unit = unit.append_column("position", pa.array(chunk.first_position + rows))
                yield _as_row(unit.append_column(_SOURCE, pa.array(sources[chunk.permutation[rows]])))


def _records(reader: SliceReader, order: RunOrder, index: int) -> tuple[Chunk, pa.Table]:
    chunk = order.chunk(index)
    # In one piece: `take` would else put all the pieces together for every unit.
    return chunk, reader.read(chunk.slices).combine_chunks()


def _units(chunk: Chunk, plan: StreamPlan, most_steps: int) -> Iterator[np.ndarray[Any, Any]]:
    """Row numbers of each unit of a chunk: worker 0's, worker 1's, … of a few steps, then those of the next few.

    Units hold at most `most_steps`, and at first no more than a sixteenth of the steps before them: training starts at once,
    and what is decoded ahead stays little beside what a short run trains on.
    """
    start = max(plan.start_position - chunk.first_position, 0)
    last = min(plan.stop_position - chunk.first_position, chunk.rows)
    batch = plan.order.global_batch_size
    while start < last:
        gone = (chunk.first_position + start - plan.start_position) // batch
        stop = min(start + batch * max(1, min(most_steps, gone // 16)), last)
        steps = np.arange(start, stop).reshape(-1, plan.num_workers, plan.rank_batch_size)
        for rank in range(plan.num_workers):
            yield steps[:, rank].reshape(-1)
        start = stop


def _as_row(table: pa.Table) -> pa.Table:
    """A table of one row, whose columns are lists of the table's; of a table in one piece without a copy."""
    offsets = pa.array([0, table.num_rows], pa.int64())
    columns = [pa.LargeListArray.from_arrays(offsets, column.combine_chunks()) for column in table.columns]
    return pa.table(columns, names=table.column_names)


def _rows_of(row: pa.Table) -> pa.Table:
    """The table that `_as_row` made a row of."""
    return pa.table([column.combine_chunks().flatten() for column in row.columns], names=row.column_names)


class DecodeActor:
    """Encoded units in, arrays out."""

    def __init__(self, spec: BatchSpec, seed: int, folders: Sequence[str]) -> None:
        self.spec = spec
        self.seed = seed
        self.folders = folders
        warm_up(spec)

    def __call__(self, units: pa.Table) -> Iterator[Batch]:
        for index in range(units.num_rows):
            records = _rows_of(units.slice(index, 1))
            try:
                batch = self._decode(records)
            except DataError:
                self._name_the_folder(records)
                raise
            yield {name: array[np.newaxis] for name, array in batch.items()}

    def _decode(self, records: pa.Table) -> Batch:
        return make_batch(records, records.column("position").to_numpy(), self.spec, self.seed)

    def _name_the_folder(self, records: pa.Table) -> None:
        """Raises what is wrong with them once more, with the folder: an id may be there in every source."""
        sources = records.column(_SOURCE).to_numpy()
        for number in np.unique(sources):
            try:
                self._decode(records.filter(sources == number))
            except DataError as error:
                raise DataError(f"{self.folders[number]!r}: {error}") from None


class ClipActor:
    """Units in, the same units with CLIP's embeddings out."""

    def __init__(self, pool: ClipPool) -> None:
        device = "cuda" if pool.gpus else "cpu"
        self.stage = ClipEmbedStage(pool.source, device, microbatch=pool.microbatch, text_states=pool.text_states)
        self.stage.setup()

    def __call__(self, units: Batch) -> Iterator[Batch]:
        for index in range(len(units["position"])):
            batch = self.stage.process({name: array[index] for name, array in units.items()})
            yield {name: array[np.newaxis] for name, array in batch.items()}


def data_context() -> DataContext:
    """Settings of the stream's own execution; the process's settings stay as they are."""
    context = DataContext.get_current().copy()
    context.execution_options = execution_options()
    context.target_max_block_size = 1  # every unit a block of its own, handed on as soon as it is there
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None
    context._max_num_blocks_in_streaming_gen_buffer = UNITS_AHEAD  # units that a reading task is ahead of Ray Data
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [ConcurrencyCapBackpressurePolicy, _UnitsAhead])
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _Rest]
    return context


class _UnitsAhead(BackpressurePolicy):
    """Bounds the stream by counting units, so that memory is known and nothing can starve.

    Ray Data's own policies share out bytes of the object store. They stop the decoders while two workers wait for the
    second of two units, after which nothing ever moves; and where the store is large they decode far ahead, for nothing
    in a short run.
    """

    def __init__(self, data_context: DataContext, topology: Topology, resource_manager: ResourceManager) -> None:
        super().__init__(data_context, topology, resource_manager)
        operators = list(topology)
        self._reader = operators[1]  # after the operator that holds the numbers of chunks
        self._limit = UNITS_AHEAD * operators[-1].num_output_splits()

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """New units are decoded or embedded while few wait behind them."""
        operators = list(self._topology)
        behind = operators[operators.index(op) :]
        waiting = sum(self._topology[operator].total_enqueued_output_blocks() for operator in behind)
        return op is self._reader or waiting < self._limit + (op.get_max_concurrency_limit() or 0)

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        """The reader waits while enough encoded units wait for the decoders."""
        is_enough = op is self._reader and self._topology[op].total_enqueued_output_blocks() >= self._limit
        return 0 if is_enough else None


class _Rest(ExecutionCallback):
    """Lets Ray Data's scheduling loop sleep in every round, longer where nothing moves.

    While everything waits for the workers, or for the decoders, it would spin and take half a core from either on a small
    machine. Nothing waits for the loop: decoders and workers have units in hand.
    """

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._still_s = 0.0

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        assert executor._topology is not None
        places = [
            (operator.num_active_tasks(), state.total_enqueued_output_blocks())
            for operator, state in executor._topology.items()
        ]
        self._still_s = min(2 * self._still_s, _LONGEST_REST_S) if places == self._places else _REST_S
        self._places = places
        time.sleep(self._still_s if executor._consumer_idling() else max(self._still_s, 2 * _REST_S))
