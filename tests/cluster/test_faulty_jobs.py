"""Ingest and embedding on an object store that fails all the time: the same files as on one that does not."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.support import faults
from tests.support.s3 import ObjectStore

from unclip.cluster.embed import EmbedConfig, run_embed
from unclip.cluster.ingest import IngestConfig, run_ingest
from unclip.utils import storage

KINDS = tuple(kind for kind in faults.PASSING if kind != faults.SLOW_DOWN_RETRY_AFTER)  # which is all waiting
RATE = 0.15


@pytest.fixture
def sources(disturbed_store: ObjectStore) -> list[dict[str, str]]:
    """20 pictures and a broken one in a Parquet file; a tar of 25, of which five are among those."""
    folder = f"{disturbed_store.uri}/faulty-jobs/in"
    images = pa.array([picture(number) for number in range(20)] + [b"x"], pa.large_binary())
    table = pa.table({"image": images, "caption": [f"picture {number}" for number in range(21)]})
    parquet, tar = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet, row_group_size=10)
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for number in range(15, 40):
            for suffix, content in (("png", picture(number)), ("txt", b"in a tar: %d" % number)):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    storage.write_bytes(f"{folder}/parquet/a.parquet", parquet.getvalue())
    storage.write_bytes(f"{folder}/tars/0.tar", tar.getvalue())
    return [{"kind": "parquet", "uri": f"{folder}/parquet"}, {"kind": "webdataset", "uri": f"{folder}/tars"}]


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).resize((40, 40), Image.Resampling.BICUBIC).save(sink, "PNG")
    return sink.getvalue()


def test_what_jobs_write_does_not_tell_that_the_store_failed(
    sources: list[dict[str, str]], disturbed_store: ObjectStore, tiny_clip: str
) -> None:
    root = f"{disturbed_store.uri}/faulty-jobs"

    def ingest(out: str) -> IngestConfig:
        shards = {"shard_bytes": 40_000, "row_group_bytes": 16_000, "row_group_rows": 8}
        return IngestConfig.from_dict({"sources": sources, "out": f"{root}/{out}", "shards": shards})

    def embed(name: str) -> EmbedConfig:
        return EmbedConfig(data=f"{root}/{name}", out=f"{root}/{name}-embedded", clip=tiny_clip)

    calm, calm_embedded = run_ingest(ingest("calm")), run_embed(embed("calm"))
    with disturbed_store.proxy.faults(seed=5, kinds=KINDS, rate=RATE) as plan:
        stormy = run_ingest(ingest("stormy"))
    assert sum(plan.injected.values()) >= 5
    assert stormy == calm
    with disturbed_store.proxy.faults(seed=6, kinds=KINDS, rate=RATE) as plan:
        stormy_embedded = run_embed(embed("stormy"))
    assert sum(plan.injected.values()) >= 5
    for fact in ("rows", "shards", "statistics", "pca", "records_sha256"):
        assert stormy_embedded[fact] == calm_embedded[fact]
    for name in ("", "-embedded"):
        assert storage.names(f"{root}/stormy{name}") == storage.names(f"{root}/calm{name}")
