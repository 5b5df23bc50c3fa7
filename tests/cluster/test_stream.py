"""The stream against the order it promises: every sample once, at its place, for any number of workers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data._internal.logical.optimizers import get_execution_plan

from unclip.cluster import stream
from unclip.data.batches import Batch, BatchSpec, make_batch
from unclip.data.embedding import ClipEmbedStage
from unclip.data.manifest import SliceReader, scan
from unclip.data.order import RunOrder
from unclip.models.clip import load_clip

BATCH = 12
CHUNK = 36
STEPS = 15  # one epoch and a half; the epoch's last chunk is a short one


def make_plan(
    *records: str, workers: int, spec: BatchSpec | None = None, weights: tuple[float, ...] = (1.0,), **changes: Any
) -> stream.StreamPlan:
    manifests = tuple(scan(folder, ("id", "image")) for folder in records)
    rows = [[fragment.rows for fragment in manifest.fragments] for manifest in manifests]
    order = RunOrder(rows, seed=3, weights=weights, global_batch_size=BATCH, chunk_rows=CHUNK)
    plan = stream.StreamPlan(manifests, order, spec or BatchSpec(image_size=8), workers, 0, STEPS * BATCH)
    return replace(plan, **changes)


def consume(plan: stream.StreamPlan, *, told: stream.StreamPlan | None = None) -> list[list[dict[str, np.ndarray]]]:
    """What each worker gets, step by step; workers believe in the plan `told`."""
    told = told or plan

    @ray.remote(num_cpus=0.5)
    def worker(shard: ray.data.DataIterator, rank: int) -> list[dict[str, np.ndarray]]:
        return [{name: tensor.numpy() for name, tensor in step.items()} for step in stream.batches(shard, told, rank)]

    shards = stream.build_dataset(plan).streaming_split(plan.num_workers, equal=True)
    return ray.get([worker.remote(shard, rank) for rank, shard in enumerate(shards)], timeout=300)


def expected_ids(plan: stream.StreamPlan) -> np.ndarray:
    """Ids of the run in their order, from the definition alone: record ids count rows in the order of fragments."""
    first_id = np.cumsum([0, *(fragment.rows for manifest in plan.manifests for fragment in manifest.fragments)])
    first_of_source = np.cumsum([0, *(len(manifest.fragments) for manifest in plan.manifests)])
    ids: list[int] = []
    for index in range(plan.order.chunk_of(plan.stop_position - 1) + 1):
        chunk = plan.order.chunk(index)
        slices = [(first_of_source[s] + f, a, b) for s, parts in enumerate(chunk.slices) for f, a, b in parts]
        rows = np.concatenate([first_id[f] + np.arange(start, stop) for f, start, stop in slices])
        ids.extend(rows[chunk.permutation])
    return np.array(ids)[plan.start_position : plan.stop_position]


def run_order(workers: list[list[dict[str, np.ndarray]]], name: str) -> np.ndarray:
    """A column in the order of the run: worker 0's part of a step, worker 1's, … then the next step."""
    return np.concatenate([step[name] for steps in zip(*workers, strict=True) for step in steps])


@pytest.mark.parametrize("workers", [1, 2])
def test_every_sample_comes_once_and_at_its_place(records: str, workers: int) -> None:
    plan = make_plan(records, workers=workers)
    got = consume(plan)
    assert [len(steps) for steps in got] == [STEPS] * workers
    assert all(len(step["id"]) == BATCH // workers for steps in got for step in steps)
    np.testing.assert_array_equal(run_order(got, "position"), np.arange(STEPS * BATCH))
    ids = run_order(got, "id")
    np.testing.assert_array_equal(ids, expected_ids(plan))
    assert sorted(ids[:120]) == list(range(120))
    images = run_order(got, "image")
    assert images.shape == (STEPS * BATCH, 8, 8, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[..., 0], np.broadcast_to(ids[:, None, None], images.shape[:3]))


def test_goes_on_in_the_middle_of_a_chunk_with_other_workers(records: str) -> None:
    stop = 4 * BATCH  # after the first step of the second chunk
    before = consume(make_plan(records, workers=2, stop_position=stop))
    plan = make_plan(records, workers=3, start_position=stop)
    after = consume(plan)
    np.testing.assert_array_equal(run_order(after, "position"), np.arange(stop, STEPS * BATCH))
    ids = np.concatenate([run_order(before, "id"), run_order(after, "id")])
    np.testing.assert_array_equal(ids, expected_ids(replace(plan, start_position=0)))


def test_two_sources_share_every_batch_and_every_worker_s_part_of_it(records: str, more_records: str) -> None:
    """Two thirds and one third of 12 samples; ids from 120 on are the second source's. Gone on with by other workers."""
    plan = make_plan(records, more_records, workers=2, weights=(2, 1))
    got = consume(plan)
    ids = run_order(got, "id")
    np.testing.assert_array_equal(ids, expected_ids(plan))
    assert {int((step["id"] < 120).sum()) for steps in got for step in steps} == {BATCH // 3}
    assert sorted(ids[ids < 120][:120]) == list(range(120))  # a whole epoch of each
    assert sorted(ids[ids >= 120][:50]) == list(range(120, 170))
    start, stop = 4 * BATCH, 7 * BATCH
    later = consume(replace(plan, num_workers=3, start_position=start, stop_position=stop))
    np.testing.assert_array_equal(run_order(later, "id"), ids[start:stop])
    images = run_order(got, "image")
    np.testing.assert_array_equal(images[..., 0], np.broadcast_to(ids[:, None, None], images.shape[:3]))


def test_many_steps_in_a_unit_and_many_tasks(records: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of one chunk each, and units that hold several steps of one worker."""
    monkeypatch.setattr(stream, "CHUNKS_PER_TASK", 1)
    plan = make_plan(records, workers=2, data_cpus=2)
    assert plan.order.chunk_of(plan.stop_position - 1) > 2
    np.testing.assert_array_equal(run_order(consume(plan), "id"), expected_ids(plan))


def test_units_begin_small_and_grow_to_what_is_allowed(records: str) -> None:
    """A chunk is three steps: one step at first, never more than a sixteenth of what went before, then the chunk."""
    plan = make_plan(records, workers=1, stop_position=60 * BATCH)
    units = stream.build_dataset(plan).iter_batches(batch_size=1, batch_format="numpy")
    steps = [unit["position"].shape[1] // BATCH for unit in units]
    before = np.cumsum([0, *steps[:-1]])
    assert all(now <= max(1, gone // 16) for now, gone in zip(steps, before, strict=True))
    assert steps[-4:] == [3, 3, 3, 3]
    assert sum(steps) == 60


def test_a_unit_is_bounded_in_rows_and_in_bytes(records: str) -> None:
    plan = make_plan(records, workers=2)
    assert plan.rank_batch_size == 6
    assert plan.steps_per_unit(encoded_bytes=100) == stream.UNIT_ROWS // 6
    assert plan.steps_per_unit(encoded_bytes=stream.UNIT_BYTES / 24) == 4
    assert plan.steps_per_unit(encoded_bytes=stream.UNIT_BYTES) == 1
    decoded = replace(plan, spec=BatchSpec(image_size=1024, crop_size=256, low_res_size=64))
    assert decoded.steps_per_unit(encoded_bytes=100) == stream.UNIT_BYTES // (3 * (256**2 + 64**2)) // 6


def test_other_samples_than_expected_are_refused(records: str) -> None:
    plan = make_plan(records, workers=1)
    with pytest.raises(stream.StreamError, match="worker 0 expected positions 12 to 23, got \\[0, 1"):
        consume(plan, told=replace(plan, start_position=BATCH))


def test_an_early_end_is_refused(records: str) -> None:
    plan = make_plan(records, workers=1, stop_position=2 * BATCH)
    with pytest.raises(stream.StreamError, match="ended at position 24 of 36"):
        consume(plan, told=replace(plan, stop_position=3 * BATCH))


def test_a_record_that_cannot_be_used_is_named_with_its_folder(records: str, more_records: str, tmp_path: Path) -> None:
    """Of two folders with the same ids."""
    table = pq.read_table(f"{more_records}/part-0.parquet")
    broken = pa.array([b"no picture"] * table.num_rows, pa.large_binary())
    pq.write_table(table.set_column(1, "image", broken), tmp_path / "a.parquet")
    plan = make_plan(more_records, str(tmp_path), workers=1, weights=(1, 1), stop_position=BATCH)
    with pytest.raises(Exception, match=rf"'{tmp_path}': record 1\d\d: not a readable picture"):
        consume(plan)


def test_the_stream_waits_for_a_worker_that_waits(
    records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker takes one step of 200 and rests: a bounded number of units is read and decoded."""
    read, decoded = (tmp_path / name for name in ("read", "decoded"))
    for folder in (read, decoded):
        folder.mkdir()
    whole_read, whole_decoder = stream._read, stream.DecodeActor

    def counted_read(tasks: Batch, plan: stream.StreamPlan) -> Iterator[pa.Table]:
        for unit in whole_read(tasks, plan):
            (read / str(time.monotonic_ns())).touch()
            yield unit

    class CountedDecoder(whole_decoder):  # type: ignore[misc, valid-type]
        def __call__(self, units: pa.Table) -> Iterator[Batch]:
            for batch in super().__call__(units):
                (decoded / str(time.monotonic_ns())).touch()
                yield batch

    monkeypatch.setattr(stream, "_read", counted_read)
    monkeypatch.setattr(stream, "DecodeActor", CountedDecoder)
    plan = make_plan(records, workers=1, stop_position=200 * BATCH)
    (shard,) = stream.build_dataset(plan).streaming_split(1, equal=True)
    steps = stream.batches(shard, plan, 0)
    next(steps)
    counts = [(0, 0)]
    while counts[-1] == (0, 0) or counts[-1] != counts[max(0, len(counts) - 10)]:  # for a second nothing more comes
        counts.append((len(list(read.iterdir())), len(list(decoded.iterdir()))))
        time.sleep(0.1)
    ahead = stream.PREFETCH_UNITS + stream.STEPS_AHEAD + stream.UNITS_AHEAD
    assert counts[-1][1] <= ahead + 8  # those in hand
    assert counts[-1][0] <= counts[-1][1] + 2 * stream.UNITS_AHEAD + 4
    assert sum(1 for _ in steps) == 199


def test_clip_in_the_stream(records: str, tiny_clip: str) -> None:
    clip = load_clip(tiny_clip)
    spec = BatchSpec(
        image_size=8,
        clip_image_size=clip.image_size,
        clip_tokenizer=tiny_clip,
        clip_context_length=clip.context_length,
    )
    plan = make_plan(records, workers=1, spec=spec, stop_position=CHUNK, clip=stream.ClipPool(tiny_clip))
    got = consume(plan)
    chunk = plan.order.chunk(0)
    table = SliceReader(plan.manifests, spec.columns()).read(chunk.slices).take(chunk.permutation)
    stage = ClipEmbedStage(tiny_clip)
    stage.setup()
    truth = stage.process(make_batch(table, chunk.positions, spec, plan.order.seed))
    assert set(got[0][0]) == set(truth)
    for name in ("id", "image", "image_embed", "text_embed"):
        np.testing.assert_allclose(run_order(got, name), truth[name], atol=2e-3, err_msg=name)
    np.testing.assert_array_equal(run_order(got, "position"), np.arange(CHUNK))


def test_decoders_and_clips_are_processes_of_their_own(records: str, tiny_clip: str) -> None:
    """Ray Data makes one operator of two where it can, and a CLIP would wait while its process decodes."""
    plan = make_plan(records, workers=1, clip=stream.ClipPool(tiny_clip))
    operators, _ = get_execution_plan(stream.build_dataset(plan)._logical_plan)
    assert operators.dag.name == "MapBatches(ClipActor)"
    assert "DecodeActor" in operators.dag.input_dependencies[0].name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 5}, "global_batch_size = 12 must be a multiple of num_workers = 5"),
        ({"start_position": 7}, "start_position = 7"),
        ({"start_position": STEPS * BATCH}, "nothing to stream"),
    ],
)
def test_plans_that_make_no_sense(records: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(records, workers=1, **changes)
