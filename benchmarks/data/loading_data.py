"""Pictures for the loading benchmark: JPEG files with the detail of photographs, as Parquet, tar and MDS shards.

Imported in the peers' environment too: NumPy, Pillow and the standard library only, the rest where it is used.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 512
SHARD_ROWS = 500
ROW_GROUP = 100
_WORDS = ("a", "photo", "of", "red", "blue", "small", "house", "cat", "boat", "tree", "near", "water", "under", "sky")


def samples(count: int) -> Iterator[tuple[int, bytes, str]]:
    """(id, JPEG, caption): noise of falling amplitude at rising frequency, as photographs have, at quality 90."""
    rng = np.random.default_rng(0)
    for index in range(count):
        sink = io.BytesIO()
        Image.fromarray(_picture(rng)).save(sink, "JPEG", quality=90)
        yield index, sink.getvalue(), " ".join(rng.choice(_WORDS, 12))


def _picture(rng: np.random.Generator) -> np.ndarray:
    picture = np.zeros((SIDE, SIDE, 3))
    for side in (4, 16, 64, 256, SIDE):
        layer = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        picture += (np.asarray(layer.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) - 128.0) * (4 / side) ** 0.6
    return (picture * 0.6 + 128).clip(0, 255).astype(np.uint8)


def write_parquet(folder: Path, count: int) -> None:
    """Records of ours, row groups of `ROW_GROUP`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    rows = list(samples(count))
    for shard, start in enumerate(range(0, count, SHARD_ROWS)):
        ids, images, captions = zip(*rows[start : start + SHARD_ROWS], strict=True)
        table = pa.table({"id": ids, "image": pa.array(images, pa.large_binary()), "caption": captions})
        pq.write_table(table, folder / f"data-{shard:05d}.parquet", row_group_size=ROW_GROUP, compression="none")


def write_tars(folder: Path, count: int) -> None:
    """img2dataset's layout."""
    folder.mkdir(parents=True)
    rows = list(samples(count))
    for shard, start in enumerate(range(0, count, SHARD_ROWS)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for index, image, caption in rows[start : start + SHARD_ROWS]:
                for suffix, content in (("jpg", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def write_mds(folder: Path, count: int) -> None:
    """mosaicml-streaming's shards."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"image": "bytes", "caption": "str"}, size_limit=1 << 25) as writer:
        for _, image, caption in samples(count):
            writer.write({"image": image, "caption": caption})


WRITERS = {"parquet": write_parquet, "tar": write_tars, "mds": write_mds}
