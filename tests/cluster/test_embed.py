"""The embedding job: every row once, in its place, with the CLIP's own numbers; the same bytes however it was interrupted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from unclip.cluster.embed import EmbedConfig, run_embed
from unclip.config.base import ConfigError
from unclip.data.batches import BatchSpec, make_batch
from unclip.data.embedding import ClipEmbedStage
from unclip.data.manifest import DataError, scan
from unclip.data.pca import PrincipalComponents
from unclip.models.clip import load_clip
from unclip.utils import storage

JOB = Path(__file__).parents[2] / "jobs" / "embed.py"
L, S = 16, 16
"""Tokens of the tiny CLIP, and the width of their states."""


def vectors(folder: Path, file: str, name: str) -> np.ndarray:
    column = pq.read_table(folder / file).column(name).combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def embedded(records: str, tiny_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "train"
    run_embed(EmbedConfig(data=records, out=str(out), clip=tiny_clip, text_states=True))
    return out


@pytest.fixture(scope="module")
def pieces(records: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same records in row groups of 4, so that the job can be stopped between many of them."""
    folder = tmp_path_factory.mktemp("pieces")
    for path in Path(records).glob("*.parquet"):
        pq.write_table(pq.read_table(path), folder / path.name, row_group_size=4)
    return folder


@pytest.fixture(scope="module")
def undisturbed(pieces: Path, tiny_clip: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "train"
    run_embed(EmbedConfig(data=str(pieces), out=str(out), clip=tiny_clip))
    return contents(out)


def test_same_files_rows_row_groups_and_columns(records: str, embedded: Path) -> None:
    files = sorted(path.name for path in Path(records).glob("*.parquet"))
    assert sorted(path.name for path in embedded.glob("*.parquet")) == files
    for file in files:
        before, after = pq.ParquetFile(Path(records) / file), pq.ParquetFile(embedded / file)
        groups = [[f.metadata.row_group(i).num_rows for i in range(f.metadata.num_row_groups)] for f in (before, after)]
        assert groups[0] == groups[1]
        table = after.read()
        assert table.select(before.schema_arrow.names).equals(before.read())
        for name, size in {"image_embed": 8, "text_embed": 8, "text_states": L * S}.items():
            assert str(table.schema.field(name).type) == f"fixed_size_list<element: halffloat>[{size}]"


def test_embeddings_are_the_clips_own(records: str, tiny_clip: str, embedded: Path) -> None:
    clip = load_clip(tiny_clip)
    spec = BatchSpec(clip_image_size=clip.image_size, clip_tokenizer=tiny_clip, clip_context_length=clip.context_length)
    stage = ClipEmbedStage(tiny_clip, text_states=True)
    stage.setup()
    for path in sorted(Path(records).glob("*.parquet")):
        table = pq.read_table(path)
        truth = stage.process(make_batch(table, np.arange(table.num_rows), spec, seed=0))
        for name in ("image_embed", "text_embed", "text_states"):
            np.testing.assert_allclose(vectors(embedded, path.name, name), truth[name], atol=2e-3, rtol=2e-3)


def test_the_manifest_says_what_is_there(records: str, tiny_clip: str, embedded: Path) -> None:
    facts, clip = json.loads((embedded / "manifest.json").read_text()), load_clip(tiny_clip)
    assert facts["clip"] == {
        "source": tiny_clip,
        "fingerprint": clip.fingerprint,
        "embed_dim": 8,
        "text_states": {"context_length": L, "state_dim": S},
    }
    assert [shard["file"] for shard in facts["shards"]] == sorted(path.name for path in embedded.glob("*.parquet"))
    for shard in facts["shards"]:
        content = (embedded / shard["file"]).read_bytes()
        footer = pq.ParquetFile(embedded / shard["file"]).metadata
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert shard["row_groups"] == [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        assert shard["rows"] == footer.num_rows
    assert facts["columns"]["text_embed"] == "fixed_size_list<element: halffloat>[8]"
    assert facts["columns"]["caption"] == "string"

    every = np.concatenate([vectors(embedded, s["file"], "image_embed") for s in facts["shards"]]).astype(np.float64)
    statistics = facts["statistics"]
    assert facts["rows"] == statistics["count"] == len(every) == 120
    np.testing.assert_allclose(statistics["mean"], every.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(statistics["std"], every.std(axis=0), atol=1e-12)
    assert statistics["scale"] == pytest.approx(17.2 * np.sqrt(8 / 1024))  # section 2.2: 17.2 at 1024 numbers
    basis = PrincipalComponents.load(str(embedded / facts["pca"]["file"]))
    assert basis.clip == clip.fingerprint
    assert facts["pca"]["components"] == basis.num_components
    variances = np.linalg.svd(every - every.mean(axis=0), compute_uv=False) ** 2 / len(every)
    np.testing.assert_allclose(basis.eigenvalues, variances[: basis.num_components], rtol=1e-6, atol=1e-12)
    needed = int((1 - variances.cumsum() / variances.sum() > 0.01).sum()) + 1
    assert facts["pca"]["components_for_1_percent_error"] == needed


def test_what_the_source_says_is_carried_on(embedded: Path, tiny_clip: str, tmp_path: Path) -> None:
    """Counts and configuration of how the records came about stay; what embedding makes, columns too, is made anew."""
    source = tmp_path / "source"
    shutil.copytree(embedded, source)
    first = json.loads((source / "manifest.json").read_text())
    told = {"schema_version": 1, "counts": {"rows_in": 121, "kept": 120}, "config": {"sources": ["somewhere"]}}
    (source / "manifest.json").write_text(json.dumps(first | told | {"quarantine": [{"file": "part-0.parquet"}]}))
    second = run_embed(EmbedConfig(data=str(source), out=str(tmp_path / "again"), clip=tiny_clip))
    assert {name: second[name] for name in told} == told
    assert "quarantine" not in second  # its files are not here
    assert "text_states" not in second["columns"]
    assert second["statistics"] == first["statistics"]
    assert second["records_sha256"] != first["records_sha256"]
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        path.name for path in source.iterdir()
    )


def run_disturbed(pieces: Path, out: Path, tiny_clip: str, disturb: Callable[[], None]) -> bool:
    """Runs the job here; `disturb` comes when the first shard is there. Whether it came in the midst of the work."""
    in_the_midst: list[bool] = []

    def watch() -> None:
        wait_for_a_shard(out)
        in_the_midst.append(not (out / "manifest.json").exists())
        disturb()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run_embed(EmbedConfig(data=str(pieces), out=str(out), clip=tiny_clip))
    watcher.join(timeout=60)
    return in_the_midst == [True]


def wait_for_a_shard(out: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(out.glob("_parts/*.parquet.json")):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_the_clip() -> None:
    """kill -9 for every actor with a CLIP."""
    actors = [process for process in psutil.Process().children(recursive=True) if "ClipActor" in process.name()]
    actors = actors or [p for p in psutil.Process().children(recursive=True) if "ClipActor" in " ".join(p.cmdline())]
    assert actors
    for process in actors:
        process.kill()


def test_a_killed_actor_leaves_no_trace(
    pieces: Path, tiny_clip: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    assert run_disturbed(pieces, tmp_path / "out", tiny_clip, kill_the_clip)
    assert contents(tmp_path / "out") == undisturbed


def test_a_killed_job_goes_on_where_it_stopped(
    pieces: Path, tiny_clip: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = [f"data={pieces}", f"out={out}", f"clip={tiny_clip}"]
    command = [sys.executable, str(JOB), *(part for setting in settings for part in ("--set", setting))]
    job = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for_a_shard(out)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert not (out / "manifest.json").exists()
    finished = {path.name.removesuffix(".json") for path in out.glob("_parts/*.parquet.json")}
    assert 1 <= len(finished) < 3
    with pytest.raises(DataError):
        scan(str(out))  # nobody trains on half of it
    written = {name: (out / name).stat().st_mtime_ns for name in finished}
    run_embed(EmbedConfig(data=str(pieces), out=str(out), clip=tiny_clip))
    assert contents(out) == undisturbed
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == written


def test_a_complete_folder_is_left_as_it_is_and_other_records_are_refused(
    pieces: Path, tiny_clip: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    table = pq.read_table(pieces / "part-1.parquet")
    pq.write_table(table, source / "data.parquet")
    config = EmbedConfig(data=str(source), out=str(out), clip=tiny_clip)
    facts = run_embed(config)
    before = contents(out)
    assert run_embed(config) == facts
    with pytest.raises(DataError, match=r"out = .* begun with text_states = False, now it is True; choose another"):
        run_embed(config.merged({"text_states": True}))
    captions = pa.array([text.upper() for text in table.column("caption").to_pylist()])
    pq.write_table(table.set_column(2, "caption", captions), source / "data.parquet")
    with pytest.raises(DataError, match=r"out = .*: was begun with records = "):
        run_embed(config)
    with pytest.raises(DataError, match="holds files that this job did not make"):
        run_embed(config.merged({"out": str(source)}))
    assert contents(out) == before


def test_bad_records_are_named(records: str, tiny_clip: str, tmp_path: Path) -> None:
    table = pq.read_table(Path(records) / "part-0.parquet")
    images = table.column("image").to_pylist()
    images[23] = images[23][:40]
    broken = table.set_column(1, "image", pa.array(images, pa.large_binary()))
    pq.write_table(broken, tmp_path / "shard.parquet", row_group_size=16)
    with pytest.raises(DataError, match=r"shard\.parquet': record 23: not a readable picture"):
        run_embed(EmbedConfig(data=str(tmp_path), out=str(tmp_path / "out"), clip=tiny_clip))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_clip_that_gives_no_numbers_is_refused(records: str, tiny_clip: str, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    shutil.copytree(tiny_clip, clip)
    weights = load_file(clip / "model.safetensors")
    weights["clip.visual.proj"][0, 0] = torch.inf
    save_file(weights, clip / "model.safetensors")
    with pytest.raises(DataError, match=r"record \d+: image_embed is not finite"):
        run_embed(EmbedConfig(data=records, out=str(tmp_path / "out"), clip=str(clip)))


def test_from_object_storage_to_object_storage(records: str, tiny_clip: str, embedded: Path, object_store: str) -> None:
    for path in Path(records).glob("*.parquet"):
        storage.write_bytes(f"{object_store}/embed/in/{path.name}", path.read_bytes())
    out = f"{object_store}/embed/out"
    facts = run_embed(EmbedConfig(data=f"{object_store}/embed/in", out=out, clip=tiny_clip, text_states=True))
    assert storage.names(out) == [
        "manifest.json",
        "part-0.parquet",
        "part-1.parquet",
        "part-2.parquet",
        "pca.safetensors",
    ]
    for shard in facts["shards"]:
        content = storage.read_bytes(f"{out}/{shard['file']}")
        assert content == (embedded / shard["file"]).read_bytes()
        assert pq.read_table(io.BytesIO(content)).num_rows == shard["rows"]


def test_bad_input_is_refused(records: str, tiny_clip: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data: required"):
        run_embed(EmbedConfig(out=str(tmp_path), clip=tiny_clip))
    with pytest.raises(DataError, match="does not exist"):
        run_embed(EmbedConfig(data=f"{records}/nowhere", out=str(tmp_path / "out"), clip=tiny_clip))
    assert not storage.exists(str(tmp_path / "out"))
