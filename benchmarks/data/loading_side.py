"""One side of the loading benchmark: `python -m benchmarks.data.loading_side --side webdataset --folder … --workers 2`.

Prints one line of JSON: pictures a second after the first `WARM_UP` pictures, and the seconds to the first batch. Runs in
the peers' environment too. All sides give batches of 64 pictures (uint8) and 77 tokens of each caption.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
WARM_UP = 512
TASKS = {"whole_64": (64, None), "crop_64_of_256": (256, 64)}
"""Side of the picture, and of the crop taken of it: what the decoder and the 256 upsampler train on."""

Batches = Iterator[Any]


def peer_transform(sample: dict[str, Any], *, size: int, crop: int | None, tokenize: Any) -> tuple[Any, Any]:
    """What a peer's user writes: decode all pixels, then the same resizing, cropping and tokens as ours."""
    import io

    from PIL import Image

    from unclip.data.transforms import random_crop, resize_square

    with Image.open(io.BytesIO(sample["image"])) as image:
        picture = resize_square(np.asarray(image.convert("RGB")), size)
    if crop is not None:
        picture = random_crop(picture, crop, np.random.default_rng())
    caption = sample["caption"]
    tokens = tokenize([caption if isinstance(caption, str) else caption.decode()])[0]
    return np.ascontiguousarray(picture), tokens


def _tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def webdataset_batches(folder: Path, workers: int, size: int, crop: int | None) -> Batches:
    """webdataset's own loader, shards and samples shuffled."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    transform = partial(peer_transform, size=size, crop=crop, tokenize=_tokenizer())
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .rename(image="jpg", caption="txt")
        .map(transform)
        .batched(BATCH)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def streaming_batches(folder: Path, workers: int, size: int, crop: int | None) -> Batches:
    """mosaicml-streaming's dataset, shuffled, epoch after epoch."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    transform = partial(peer_transform, size=size, crop=crop, tokenize=_tokenizer())

    class Pairs(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return transform(super().__getitem__(at))

    dataset = Pairs(local=str(folder), batch_size=BATCH, shuffle=True)
    while True:
        yield from DataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True)


def _spec(size: int, crop: int | None) -> Any:
    from unclip.data.batches import BatchSpec

    return BatchSpec(image_size=size, crop_size=crop, tokenizer="simple")


def parquet_batches(folder: Path, workers: int, size: int, crop: int | None) -> Batches:
    """The training stream, as a worker of a run gets it."""
    import ray.data

    from unclip.cluster import session, stream
    from unclip.data.manifest import scan
    from unclip.data.order import RunOrder

    session.connect()
    manifest = scan(str(folder), ("id", "image", "caption"))
    rows = [fragment.rows for fragment in manifest.fragments]
    order = RunOrder([rows], 0, global_batch_size=BATCH, chunk_rows=16 * BATCH)
    plan = stream.StreamPlan(
        (manifest,),
        order,
        _spec(size, crop),
        num_workers=1,
        start_position=0,
        stop_position=10**6 * BATCH,
        data_cpus=workers,
    )
    with ray.data.DataContext.current(stream.data_context()):
        shard = stream.build_dataset(plan).streaming_split(1, equal=True)[0]
    return stream.batches(shard, plan, 0)


def tar_batches(folder: Path, workers: int, size: int, crop: int | None) -> Batches:
    """Our tar reader and batches, shard by shard, in as many processes."""
    from unclip.data.sources.webdataset import WebDatasetSourceConfig

    count = len(WebDatasetSourceConfig(uri=str(folder)).build().parts())
    jobs = ((part % count, str(folder), size, crop) for part in range(10**6))
    return _in_processes(_tar_part, jobs, workers)


def _tar_part(job: tuple[int, str, int, int | None]) -> list[Any]:
    import pyarrow as pa

    from unclip.data.batches import make_batch
    from unclip.data.sources.webdataset import WebDatasetSourceConfig

    part, folder, size, crop = job
    source = WebDatasetSourceConfig(uri=folder).build()
    table = pa.concat_tables(source.read(source.parts()[part]))
    table = table.append_column("id", pa.array(np.arange(table.num_rows)))
    batches = (table.slice(start, BATCH) for start in range(0, table.num_rows, BATCH))
    return [make_batch(batch, np.arange(batch.num_rows), _spec(size, crop), 0) for batch in batches]


def decode_batches(_folder: Path, workers: int, size: int, _crop: int | None) -> Batches:
    """The decoder library alone, at the scale that the task allows: what no loader can pass."""
    from benchmarks.data.loading_data import samples

    pictures = [image for _, image, _ in samples(4 * BATCH)]
    return _in_processes(_decode, ((pictures, size) for _ in range(10**6)), workers)


def _decode(job: tuple[list[bytes], int]) -> list[Any]:
    from unclip.data.decode import decode_image

    pictures, size = job
    for picture in pictures:
        decode_image(picture, target=size)
    return [np.zeros(BATCH)] * (len(pictures) // BATCH)


def _in_processes(work: Callable[[Any], list[Any]], jobs: Iterator[Any], workers: int) -> Batches:
    """What `work` makes of each job, jobs running in `workers` processes, a few ahead of what is taken."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pending = [pool.apply_async(work, (next(jobs),)) for _ in range(2 * workers)]
        while True:
            done = pending.pop(0)
            pending.append(pool.apply_async(work, (next(jobs),)))
            yield from done.get()


SIDES = {
    "parquet": parquet_batches,
    "tar": tar_batches,
    "webdataset": webdataset_batches,
    "streaming": streaming_batches,
    "decode": decode_batches,
}
FORMATS = {"parquet": "parquet", "tar": "tar", "webdataset": "tar", "streaming": "mds", "decode": "parquet"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    size, crop = TASKS[arguments.task]
    began = time.perf_counter()
    batches = SIDES[arguments.side](arguments.folder / FORMATS[arguments.side], arguments.workers, size, crop)
    next(batches)
    first = time.perf_counter() - began
    for _ in range(WARM_UP // BATCH):
        next(batches)
    started, images = time.perf_counter(), 0
    while time.perf_counter() - started < arguments.seconds:
        next(batches)
        images += BATCH
    rate = images / (time.perf_counter() - started)
    print(json.dumps({"images_per_second": rate, "first_batch_s": first}), flush=True)
    os._exit(0)  # loaders that never end would wait for their workers


if __name__ == "__main__":
    main()
