"""Time and memory of finding duplicates, by number of rows: whether the time a row stays flat.

python -m benchmarks.data.duplicates --rows 10000 100000 1000000

A tenth of the pictures are copies of others, a tenth near copies (1 to 3 bits of the hash), a twentieth are flat and share
a few hashes, and a twentieth are nearly flat: within six bits of one hash for every 5,000 of them, which overfills buckets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from unclip.data.ingest.duplicates import HASHES, DuplicatePolicy, Handle, find_duplicates


def in_process(
    inputs: Sequence[Handle],
    split: Callable[..., list[pa.Table]],
    merge: Callable[[pa.Table], pa.Table],
    partitions: int,
    *shared: Handle,
) -> list[Handle]:
    """`Shuffle` in this process."""
    parts = [split(table, *shared) for table in inputs]
    return [merge(pa.concat_tables([part[index] for part in parts])) for index in range(partitions)]


def picture_hashes(rows: int, seed: int = 0) -> pa.Table:
    """HASHES of `rows` imagined pictures, as the module's head describes them."""
    rng = np.random.default_rng(seed)
    perceptual = rng.integers(0, 2**64, rows, np.uint64)
    content = rng.integers(0, 2**64, (rows, 4), np.uint64)
    pixels = rng.integers(64**2, 1024**2, rows)
    parts = np.split(rng.permutation(rows), (np.array([0.1, 0.2, 0.25, 0.3]) * rows).astype(int))
    copies, near, flat, nearly_flat = parts[:4]
    originals = rng.integers(0, rows, rows)
    perceptual[near] = perceptual[originals[near]]
    centres = rng.integers(0, 2**64, 1 + len(nearly_flat) // 5000, np.uint64)
    perceptual[nearly_flat] = centres[rng.integers(0, len(centres), len(nearly_flat))]
    for rows_of_kind, flips in ((near, 3), (nearly_flat, 6)):
        for _ in range(flips):
            perceptual[rows_of_kind] ^= np.uint64(1) << rng.integers(0, 64, len(rows_of_kind)).astype(np.uint64)
    perceptual[flat] = rng.integers(0, 8, len(flat)).astype(np.uint64)
    content[copies], perceptual[copies], pixels[copies] = (
        column[originals[copies]] for column in (content, perceptual, pixels)
    )
    order = np.arange(rows)
    hashes = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, pa.py_buffer(content.tobytes())])
    return pa.table([order, order, hashes, perceptual, pixels], schema=HASHES)


def measure(rows: int, policy: DuplicatePolicy) -> dict[str, float]:
    """Seconds, microseconds a row, and rows found of each kind."""
    table = picture_hashes(rows)
    start = time.perf_counter()
    removed = find_duplicates([table], policy, in_process, rows=rows, starts=np.zeros(1, np.int64))[0]
    seconds = time.perf_counter() - start
    reasons = removed.column("reason").to_pylist()
    counts = {reason: reasons.count(reason) for reason in ("duplicate", "near_duplicate")}
    return {"rows": rows, "seconds": seconds, "us_per_row": 1e6 * seconds / rows, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--max-distance", type=int, default=DuplicatePolicy().max_distance)
    arguments = parser.parse_args()
    policy = DuplicatePolicy(max_distance=arguments.max_distance)
    measure(10_000, policy)  # what is set up once
    print("| rows | seconds | µs a row | exact | near |\n|---|---|---|---|---|")
    for rows in arguments.rows:
        found = measure(rows, policy)
        print(
            f"| {rows:,} | {found['seconds']:.2f} | {found['us_per_row']:.2f} | {found['duplicate']:,.0f} | "
            f"{found['near_duplicate']:,.0f} |"
        )


if __name__ == "__main__":
    main()
