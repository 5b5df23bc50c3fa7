"""The training stream at scale: start and restore at 10^5 shards, memory over 10^6 records, waiting, shuffle quality.

python -m benchmarks.data.stream_scale [--parts startup shuffle memory waiting] [--records 10000 100000 1000000]

Shards are hard links to a few real Parquet files of 10 x 1000 records, so 10^5 of them (10^9 rows) need no room, and yet
every one can be listed, opened and read. Results go into --results as stream-scale-DATE.json, part by part.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from benchmarks.common import machine, version, write_json
from benchmarks.data import shuffling
from PIL import Image

from unclip.cluster import session, stream
from unclip.data.batches import BatchSpec
from unclip.data.manifest import Manifest, SliceReader, scan
from unclip.data.order import RunOrder

GROUPS, GROUP_ROWS = 10, 1000
SHARD_ROWS = GROUPS * GROUP_ROWS
LINKS = 10_000
"""Shards that share one file: file systems bound the links of a file, ext4 to 65,000."""
PIXELS, BATCH, CHUNK_ROWS = 32, 256, 16384
SPEC = BatchSpec(image_size=PIXELS)
STEPS = 400
"""Steps whose waiting is measured."""
WARM_UP_STEPS = 50
SAMPLE_S = 0.5
LEAST_SAMPLES = 250_000
PARTS = ("startup", "shuffle", "memory", "waiting")

T = TypeVar("T")


@contextmanager
def records(shards: int) -> Iterator[str]:
    """A folder of that many shards with their manifest."""
    folder = Path(tempfile.mkdtemp(prefix="unclip-scale-", dir=os.environ.get("UNCLIP_SCRATCH")))
    try:
        entries = []
        for number in range(shards):
            path, original = (
                folder / f"data-{number:06d}.parquet",
                folder / f"data-{number - number % LINKS:06d}.parquet",
            )
            if path == original:
                _write_shard(path, number)
            else:
                os.link(original, path)
            groups = [GROUP_ROWS] * GROUPS
            size = original.stat().st_size
            entries.append(
                {"file": path.name, "rows": SHARD_ROWS, "bytes": size, "sha256": "0" * 64, "row_groups": groups}
            )
        (folder / "manifest.json").write_text(json.dumps({"schema_version": 1, "shards": entries}))
        yield str(folder)
    finally:
        shutil.rmtree(folder)


def _write_shard(path: Path, seed: int) -> None:
    """Records with pictures of noise, a hundred different ones."""
    draws = np.random.default_rng(seed)
    pictures = [_jpeg(draws.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)) for _ in range(100)]
    columns = {
        "id": pa.array(np.arange(SHARD_ROWS)),
        "image": pa.array([pictures[row % len(pictures)] for row in range(SHARD_ROWS)], pa.large_binary()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=GROUP_ROWS, compression="none")


def _jpeg(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def order_of(manifest: Manifest) -> RunOrder:
    rows = [fragment.rows for fragment in manifest.fragments]
    return RunOrder([rows], seed=0, global_batch_size=BATCH, chunk_rows=CHUNK_ROWS)


# --- start and restore ------------------------------------------------------------------------------------------------


def startup(shards: int) -> dict[str, Any]:
    """Seconds from nothing to the first chunk's records, and from a cursor to its chunk; sizes of what is kept."""
    with records(shards) as folder:
        command = [sys.executable, "-m", "benchmarks.data.stream_scale", "--startup-of", folder]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    return {"shards": shards} | {name: median(run[name] for run in runs) for name in runs[0]}


def startup_of(folder: str) -> dict[str, float]:
    """In a process of its own, so that nothing is warm but the disk's cache."""
    before = _rss()
    scan_seconds, manifest = _timed(lambda: scan(folder, SPEC.columns()))
    order_seconds, order = _timed(lambda: order_of(manifest))
    chunk_seconds, chunk = _timed(lambda: order.chunk(0))
    kept = _rss() - before
    read_seconds, _ = _timed(lambda: SliceReader([manifest], SPEC.columns()).read(chunk.slices))
    position = 7 * order.sources[0].samples_per_epoch // 2 // BATCH * BATCH  # in the midst of the fourth epoch
    pickled = pickle.dumps((manifest, order))

    def restore() -> object:
        return order_of(manifest).chunk(order.chunk_of(position))

    return {
        "rows": manifest.rows,
        "scan_s": scan_seconds,
        "order_s": order_seconds,
        "first_chunk_s": chunk_seconds,
        "read_first_chunk_s": read_seconds,
        "restore_s": _timed(restore)[0],
        "next_chunk_s": _timed(lambda: order.chunk(1))[0],
        "resident_bytes": kept,
        "pickled_bytes": len(pickled),
    }


def _timed(run: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


def extrapolated(runs: list[dict[str, Any]], rows: int = 10**9) -> dict[str, float]:
    """The times of the largest run, in proportion to its rows, for `rows`; reading a chunk does not depend on them."""
    largest = runs[-1]
    times = ("scan_s", "order_s", "first_chunk_s", "restore_s")
    return {"rows": rows} | {name: largest[name] * rows / largest["rows"] for name in times}


# --- through Ray ------------------------------------------------------------------------------------------------------


class Trainer:
    """Takes steps from the stream, each of so many seconds in which its CPU is free, as a GPU's is."""

    def train(self, shard: ray.data.DataIterator, plan: stream.StreamPlan, step_seconds: float) -> dict[str, float]:
        waited: list[float] = []
        seen = 0
        batches = stream.batches(shard, plan, 0)
        started = time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            waited.append(time.perf_counter() - asked)
            seen += len(batch["id"])
            if len(waited) == WARM_UP_STEPS:
                started = time.perf_counter()
            time.sleep(step_seconds)
        measured = waited[WARM_UP_STEPS:]
        seconds = time.perf_counter() - started
        return {
            "samples": seen,
            "waiting_share": sum(measured) / seconds,
            "longest_wait_s": max(measured, default=0.0),
            "samples_per_second": len(measured) * BATCH / seconds,
        }


def stream_through(folder: str, samples: int, step_seconds: float = 0.0) -> dict[str, float]:
    """The first `samples` of a run over `folder`, by one worker, decoded by one CPU."""
    manifest = scan(folder, SPEC.columns())
    plan = stream.StreamPlan((manifest,), order_of(manifest), SPEC, 1, 0, samples // BATCH * BATCH)
    (shard,) = stream.build_dataset(plan).streaming_split(1, equal=True)
    trainer = ray.remote(num_cpus=0.1)(Trainer).remote()
    answer: dict[str, float] = ray.get(trainer.train.remote(shard, plan, step_seconds))
    ray.kill(trainer)
    return answer


class MemorySampler:
    """Memory of this process and all it started, Ray's among them: anonymous pages of each, and the object store's."""

    def __init__(self) -> None:
        self.samples: list[dict[str, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.samples.append(_memory())

    def summary(self) -> dict[str, Any]:
        """Bytes: the peak, means over the second and the last quarter of the time, and by process in the end."""
        total = np.array([sum(sample.values()) for sample in self.samples])
        quarter = len(total) // 4
        return {
            "peak_bytes": int(total.max()),
            "second_quarter_bytes": round(float(total[quarter : 2 * quarter].mean())),
            "last_quarter_bytes": round(float(total[-quarter:].mean())),
            "by_process": self.samples[-1],
            "seconds": len(total) * SAMPLE_S,
        }


def _memory() -> dict[str, int]:
    found: dict[str, int] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
            name = process.name()
        except (psutil.Error, OSError):
            continue
        sizes = {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("Rss")
        }
        found[name] = found.get(name, 0) + sizes.get("RssAnon", 0)
        if name == "raylet":  # every page of the store that was ever used
            found["object store"] = sizes["RssShmem"]
    return found


def memory(rows: int) -> dict[str, Any]:
    """An epoch over that many records, or as many as fill a minute, in a Ray instance of its own."""
    samples = max(rows, LEAST_SAMPLES)
    with records(rows // SHARD_ROWS) as folder, session.session(), MemorySampler() as sampler:
        answer = stream_through(folder, samples)
    return (
        {"records": rows, "samples": samples} | sampler.summary() | {"samples_per_second": answer["samples_per_second"]}
    )


def waiting() -> dict[str, Any]:
    """What a trainer waits that needs 1.5 times as long as the stream for a step, after the stream's own pace."""
    samples = (WARM_UP_STEPS + STEPS) * BATCH
    with records(100) as folder, session.session():
        alone = stream_through(folder, samples)
        step_seconds = 1.5 * BATCH / alone["samples_per_second"]
        beside = stream_through(folder, samples, step_seconds)
    return {"stream_alone": alone, "step_seconds": step_seconds, "beside_trainer": beside}


# --- everything -------------------------------------------------------------------------------------------------------


def measure(part: str, counts: list[int]) -> Any:
    if part == "startup":
        runs = [startup(shards) for shards in (1_000, 10_000, 100_000)]
        return {"runs": runs, "extrapolated": extrapolated(runs)}
    if part == "shuffle":
        return shuffling.compare()
    if part == "memory":
        runs = [memory(samples) for samples in counts]
        return {"runs": runs, "growth": runs[-1]["last_quarter_bytes"] / runs[0]["last_quarter_bytes"] - 1}
    return waiting()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--records", nargs="+", type=int, default=[10**4, 10**5, 10**6], help="for the memory part")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--startup-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.startup_of:
        print(json.dumps(startup_of(arguments.startup_of)))
        return
    path = arguments.results / f"stream-scale-{datetime.now(UTC):%Y-%m-%d}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in arguments.parts:
        results["machine"] = machine(torch.device("cpu")) | {"ray": version("ray")}
        results[part] = measure(part, arguments.records)
        write_json(path, results)
        print(json.dumps({part: results[part]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
