"""The embedding job: every row once, in its place, with the CLIP's own numbers; whole files; goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from unclip.cluster.embed import EmbedConfig, run_embed
from unclip.config.base import ConfigError
from unclip.data.batches import BatchSpec, make_batch
from unclip.data.embedding import ClipEmbedStage
from unclip.data.manifest import DataError, scan
from unclip.models.clip import load_clip
from unclip.utils import storage


def vectors(folder: Path, file: str, name: str) -> np.ndarray:
    column = pq.read_table(folder / file).column(name).combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


@pytest.fixture(scope="module")
def embedded(records: str, tiny_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "train"
    run_embed(EmbedConfig(data=records, out=str(out), clip=tiny_clip))
    return out


def test_same_files_rows_row_groups_and_columns(records: str, embedded: Path) -> None:
    files = sorted(path.name for path in Path(records).glob("*.parquet"))
    assert sorted(path.name for path in embedded.glob("*.parquet")) == files
    for file in files:
        before, after = pq.ParquetFile(Path(records) / file), pq.ParquetFile(embedded / file)
        groups = [[f.metadata.row_group(i).num_rows for i in range(f.metadata.num_row_groups)] for f in (before, after)]
        assert groups[0] == groups[1]
        table = after.read()
        assert table.select(before.schema_arrow.names).equals(before.read())
        assert str(table.schema.field("image_embed").type) == "fixed_size_list<element: halffloat>[8]"


def test_embeddings_and_statistics_are_the_clips_own(records: str, tiny_clip: str, embedded: Path) -> None:
    clip = load_clip(tiny_clip)
    spec = BatchSpec(clip_image_size=clip.image_size, clip_tokenizer=tiny_clip, clip_context_length=clip.context_length)
    stage = ClipEmbedStage(tiny_clip)
    stage.setup()
    found = []
    for path in sorted(Path(records).glob("*.parquet")):
        table = pq.read_table(path)
        truth = stage.process(make_batch(table, np.arange(table.num_rows), spec, seed=0))
        for name in ("image_embed", "text_embed"):
            np.testing.assert_allclose(vectors(embedded, path.name, name), truth[name], atol=2e-3)
        found.append(vectors(embedded, path.name, "image_embed").astype(np.float64))
    every = np.concatenate(found)
    facts = scan(str(embedded), ("image_embed", "text_embed")).facts
    assert facts["rows"] == facts["statistics"]["count"] == len(every) == 120
    assert facts["clip"] == {"source": tiny_clip, "fingerprint": clip.fingerprint, "embed_dim": 8}
    np.testing.assert_allclose(facts["statistics"]["mean"], every.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(facts["statistics"]["std"], every.std(axis=0), atol=1e-12)


def test_goes_on_where_it_stopped(records: str, tiny_clip: str, embedded: Path) -> None:
    """As after a kill: one shard and the manifest are missing; the others are not touched."""
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in embedded.glob("*.parquet")}
    (embedded / "part-1.parquet").unlink()
    (embedded / "manifest.json").unlink()
    run_embed(EmbedConfig(data=records, out=str(embedded), clip=tiny_clip))
    for name, (written, _) in before.items():
        assert ((embedded / name).stat().st_mtime_ns == written) == (name != "part-1.parquet")
    table = pq.read_table(embedded / "part-1.parquet")
    assert table.column("id").to_pylist() == list(range(40, 70))
    assert scan(str(embedded)).facts["statistics"]["count"] == 120


def test_bad_input_is_refused(records: str, tiny_clip: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data: required"):
        run_embed(EmbedConfig(out=str(tmp_path), clip=tiny_clip))
    with pytest.raises(DataError, match="does not exist"):
        run_embed(EmbedConfig(data=f"{records}/nowhere", out=str(tmp_path / "out"), clip=tiny_clip))
    assert not storage.exists(str(tmp_path / "out"))
