"""A job that ends anywhere is gone on with: every id once, nothing left over, and nothing mixed."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from unclip.config.base import ConfigError
from unclip.data.decode import decode_image
from unclip.data.manifest import DataError
from unclip.data.sources import WebDatasetSourceConfig
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.job import BulkJob
from unclip.generation.bulk.maker import PictureMaker
from unclip.generation.outputs import read_png
from unclip.pipelines.bundle import BundleError

Run = Callable[[GenerateConfig], dict[str, Any]]
MakeConfig = Callable[..., GenerateConfig]

ONE_STEP = {"up_to": 16, "decoder": {"num_inference_steps": 1}, "prior": {"num_inference_steps": 1}}
CSV = "prompt,n\na red heart,2\n,\na blue circle,\na dog,0\n,\na green star,2\n"
"""In units of two: a done and a refused row, the same, the same the other way round."""


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.csv").write_text(CSV)
    return str(tmp_path / "prompts.csv")


def go_on(config: GenerateConfig, maker: Callable[[BulkJob], PictureMaker]) -> dict[str, Any]:
    job = BulkJob.prepare(config)
    for unit in job.begin():
        maker(job).process(unit)
    return job.finish()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pictures(config: GenerateConfig) -> dict[Any, np.ndarray]:
    """By their ids (in format folder by their names); fails where one is there twice."""
    out = Path(config.out)
    if config.format == "folder":
        return {str(path.relative_to(out)): read_png(str(path)) for path in sorted(out.glob("*/*.png"))}
    if config.format == "parquet":
        rows = [row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    else:
        source = WebDatasetSourceConfig(uri=config.out, fields={"id": "int64"}).build()
        rows = [row for part in source.parts() for table in source.read(part) for row in table.to_pylist()]
    assert max(Counter(row["id"] for row in rows).values()) == 1
    return {row["id"]: decode_image(row["image"]) for row in rows}


def assert_same(mine: dict[Any, np.ndarray], theirs: dict[Any, np.ndarray]) -> None:
    assert mine.keys() == theirs.keys()
    for name, picture in mine.items():
        assert np.abs(picture.astype(int) - theirs[name].astype(int)).max() <= 1, name


@contextmanager
def snapshots(folder: Path, into: Path) -> Iterator[list[Path]]:
    """Copies of the folder as a kill would leave it before each of the operations on its files, each state once."""
    taken: list[Path] = []
    seen: set[str] = set()
    is_on = True
    is_copying = False

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_copying
        named = str(arguments[0]) if arguments else ""
        if not is_on or is_copying or event not in ("open", "os.rename", "os.remove") or str(folder) not in named:
            return
        is_copying = True
        try:
            state = hashlib.sha256()
            for name in sorted(files(folder)):
                state.update(f"{name.split('.tmp')[0][-20:]} {(folder / name).stat().st_size} ".encode())
            if state.hexdigest() not in seen:
                seen.add(state.hexdigest())
                taken.append(Path(shutil.copytree(folder, into / f"{len(taken):03d}")))
        finally:
            is_copying = False

    sys.addaudithook(look)  # which cannot be taken away again
    try:
        yield taken
    finally:
        is_on = False


@pytest.mark.parametrize("form", ["folder", "parquet", "webdataset"])
def test_a_kill_after_any_operation_leaves_what_can_be_gone_on_with(
    config: MakeConfig, maker: Any, prompts: str, tmp_path: Path, form: str
) -> None:
    settings = config(prompts=prompts, format=form, prompts_per_shard=2, options=ONE_STEP)
    out = Path(settings.out)
    out.mkdir()
    with snapshots(out, tmp_path / "snapshots") as states:
        manifest = go_on(settings, maker)
    complete, expected = files(out), pictures(settings)
    assert len(expected) == 5
    assert len(states) > 15
    for state in states:
        shutil.rmtree(out)
        shutil.copytree(state, out)
        again = go_on(settings, maker)
        assert files(out) == complete, state
        assert again["counts"] == manifest["counts"]
        assert_same(pictures(settings), expected)


@pytest.mark.parametrize("form", ["folder", "parquet", "webdataset"])
def test_a_storage_that_takes_no_more_leaves_what_can_be_gone_on_with(
    config: MakeConfig, maker: Any, prompts: str, form: str
) -> None:
    """The system refuses to let a file grow beyond a limit, as a full disk does."""
    settings = config(prompts=prompts, format=form, prompts_per_shard=2, options=ONE_STEP)
    job = BulkJob.prepare(settings)
    units = job.begin()
    process = maker(job).process
    before = files(Path(settings.out))
    for limit in (0, 50, 300, 1000):
        for unit in units:
            with file_limit(limit), pytest.raises(OSError, match="File too large"):
                process(unit)
        left = files(Path(settings.out)) - before
        assert not [name for name in left if name.startswith("_units")]
        assert job.receipts() == {}
    with pytest.raises(DataError, match="3 of 3 units are not there, the first 0"):
        job.finish()
    manifest = go_on(settings, maker)
    assert (manifest["counts"]["done"], manifest["counts"]["quarantined"]) == (3, 3)
    assert len(pictures(settings)) == 5


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_running_again_makes_only_what_is_missing(config: MakeConfig, maker: Any, prompts: str) -> None:
    settings = config(prompts=prompts, prompts_per_shard=2, options={**ONE_STEP, "up_to": 32})
    go_on(settings, maker)
    before = pictures(settings)
    out = Path(settings.out)
    names = sorted(path.name for path in (out / "32").iterdir())
    lost, damaged, forged = out / "16" / names[0], out / "32" / names[1], out / "16" / names[3]
    lost.unlink()
    damaged.write_bytes(b"")
    shutil.copyfile(out / "16" / names[2], forged)  # says itself that it is another
    kept = [path for path in out.glob("*/*.png") if path not in (lost, damaged, forged)]
    for path in kept:
        os.utime(path, (1, 1))
    go_on(settings, maker)
    assert_same(pictures(settings), before)
    of_damaged = {out / size / path.name for path in (lost, damaged, forged) for size in ("16", "32")}
    assert {path for path in kept if path.stat().st_mtime != 1} <= of_damaged


def test_a_finished_job_is_left_alone(config: MakeConfig, run: Run, prompts: str) -> None:
    settings = config(prompts=prompts, format="parquet", options=ONE_STEP)
    manifest = run(settings)
    shard = Path(settings.out, "data-00000.parquet")
    os.utime(shard, (1, 1))
    assert BulkJob.prepare(settings).begin() == []
    assert run(settings) == manifest
    assert shard.stat().st_mtime == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"options": {**ONE_STEP, "decoder": {"guidance_scale": 6.0}}}, "options.decoder.guidance_scale"),
        ({"precision": "bf16"}, "precision"),
        ({"seed": 1}, "seed"),
        ({"best_of": 2}, "best_of"),
        ({"format": "webdataset"}, "format"),
        ({"prompts_per_shard": 3}, "prompts_per_shard"),
        ({"prompts": "{other}"}, "prompts.files.prompts.csv.bytes"),
        ({"prompts": None, "prompt": "a dog"}, "prompts"),
        ({"bundle": "{other}"}, "bundle"),
    ],
)
def test_other_settings_are_refused(
    config: MakeConfig, prompts: str, tiny_bundle: str, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    settings = config(prompts=prompts, format="parquet", prompts_per_shard=2, options=ONE_STEP)
    BulkJob.prepare(settings).begin()
    if changes.get("prompts"):
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "prompts.csv").write_text(CSV + "a cat,1\n")
        changes = {"prompts": str(tmp_path / "more" / "prompts.csv")}
    if "bundle" in changes:
        other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
        shutil.rmtree(other / "upsampler_1024")
        changes = {"bundle": str(other)}
    with pytest.raises(ConfigError, match=f"^{field}.* was begun with"):
        BulkJob.prepare(settings.merged(changes))
    BulkJob.prepare(settings.merged({"engine": {"memory_share": 0.5}, "actors": 3, "cpus_per_actor": 2}))


def test_pictures_of_others_are_not_taken_for_the_jobs(config: MakeConfig, prompts: str, tmp_path: Path) -> None:
    (tmp_path / "out" / "16").mkdir(parents=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    settings = config(prompts=prompts)
    BulkJob.prepare(settings)
    (tmp_path / "out" / "16" / "00007-3.png").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"has 16/00007-3\.png, which this job did not make"):
        BulkJob.prepare(settings)


def test_a_bundle_that_changes_meanwhile_is_noticed(config: MakeConfig, tiny_bundle: str, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    job = BulkJob.prepare(config(prompt="a dog", bundle=str(bundle)))
    job.begin()
    shutil.rmtree(bundle / "upsampler_1024")
    with pytest.raises(BundleError, match=r"is not the bundle that .* was begun with"):
        PictureMaker(job.config).setup()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bundle": "/nowhere"}, BundleError, "'/nowhere' is no bundle"),
        ({"bundle": ""}, ConfigError, "bundle: required"),
        ({"options": {"up_to": 48}}, ConfigError, "up_to = 48"),
        ({"prompt": "dog " * 15}, ConfigError, "17 tokens .*; the networks read 16"),
        ({"prompt": "  "}, ConfigError, "the prompt is empty"),
        ({"out": "/dev/null/pictures"}, OSError, "'/dev/null/pictures' cannot be written"),
    ],
)
def test_bad_input_is_found_before_weights_are_read(
    config: MakeConfig, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BulkJob.prepare(config(**{"prompt": "a dog", **changes}))


def test_what_belongs_to_no_unit_goes_and_what_is_the_users_stays(config: MakeConfig, run: Run, prompts: str) -> None:
    settings = config(prompts=prompts, format="parquet", options=ONE_STEP)
    run(settings)
    out = Path(settings.out)
    before = files(out)
    nobodys = ("data-00007.parquet", "quarantine/part-00007.parquet", f"data-00001.parquet.{'0' * 32}.tmp")
    mine = ("12345.json", "notes.txt", "00000-0.png", f"notes.{'0' * 32}.tmp", "16/00000-0.png")
    (out / "16").mkdir()
    for name in (*nobodys, *mine):
        (out / name).write_bytes(b"x")
    run(settings)
    assert files(out) == before | set(mine)
