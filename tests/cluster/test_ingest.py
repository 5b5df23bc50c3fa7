"""The ingest job: every row accounted for, the same bytes whatever happens on the way, and no folder overwritten."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from jobs import ingest as job
from PIL import Image

from unclip.cluster.ingest import IngestConfig, run_ingest
from unclip.config.base import ConfigError
from unclip.data.manifest import DataError, scan
from unclip.utils import storage

JOB = Path(__file__).parents[2] / "jobs" / "ingest.py"
SMALL_SHARDS = {"shard_bytes": 40_000, "row_group_bytes": 16_000, "row_group_rows": 8}


def picture(number: int, name: str = "PNG", **options: Any) -> bytes:
    """A soft picture that no other number has anything like."""
    blocks = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((40, 40), Image.Resampling.BICUBIC).save(buffer, name, **options)
    return buffer.getvalue()


class Gate(ThreadingHTTPServer):
    """Serves pictures by number, each only once it is open; counts who asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked = 0
        self.is_open = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Gate

    def do_GET(self) -> None:
        self.server.asked += 1
        self.server.is_open.wait(60)
        content = picture(int(self.path.rsplit("/", 1)[-1]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    server = Gate()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.is_open.set()
    yield server
    server.is_open.set()
    server.shutdown()


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows of Parquet, 25 in a tar, 13 in a folder.

    Four cannot be used; five pictures of the tar are some of the Parquet's in another container, and three of the folder
    are some of the tar's as JPEG.
    """
    root = tmp_path_factory.mktemp("sources")
    images: list[bytes | None] = [picture(number) for number in range(30)]
    images[5:7] = [None, b"<html>not found</html>"]
    captions = [f"drawing {number}" for number in range(30)]
    captions[7] = " "
    table = pa.table({"image": pa.array(images, pa.large_binary()), "caption": captions, "score": np.arange(30) / 10})
    (root / "parquet").mkdir()
    pq.write_table(table, root / "parquet" / "a.parquet", row_group_size=10)
    with tarfile.open(root / "pictures.tar", "w") as tar:
        for number in range(25, 50):
            members = {"webp": picture(number, "WEBP", lossless=True), "txt": f"photo {number}".encode()}
            for suffix, content in members.items():
                if (number, suffix) != (40, "webp"):
                    header = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    (root / "folder").mkdir()
    for number in [45, 46, 47, *range(60, 70)]:
        name, content = ("jpg", picture(number, "JPEG", quality=92)) if number < 60 else ("png", picture(number))
        (root / "folder" / f"{number}.{name}").write_bytes(content)
        (root / "folder" / f"{number}.txt").write_text(f"file {number}")
    return root


@pytest.fixture(scope="module")
def settings(source_folder: Path, gate: Gate) -> dict[str, Any]:
    """All of these and two pictures from the web."""
    (source_folder / "list.jsonl").write_text(
        "".join(f'{{"url": "{gate.url}/{number}", "caption": "page {number}"}}\n' for number in (80, 81))
    )
    fetch = {"allow_private_addresses": True, "timeout_s": 120}
    sources = [
        {"kind": "parquet", "uri": f"{source_folder}/parquet"},
        {"kind": "webdataset", "uri": f"{source_folder}/pictures.tar"},
        {"kind": "folder", "uri": f"{source_folder}/folder", "files_per_part": 5},
        {"kind": "urls", "uri": f"{source_folder}/list.jsonl", "fetch": fetch},
    ]
    return {"sources": sources, "shards": SMALL_SHARDS}


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "records"
    run_ingest(IngestConfig.from_dict(settings | {"out": str(out), "tasks": 1}))
    return out


def hashes(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def manifest_of(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest


def table_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def test_every_row_is_kept_or_accounted_for(undisturbed: Path, source_folder: Path) -> None:
    manifest = manifest_of(undisturbed)
    assert manifest["counts"] == {
        "rows_in": 70,
        "kept": 58,
        "quarantined": {"no_caption": 1, "no_image": 2, "not_a_picture": 1},
        "duplicates": 5,
        "near_duplicates": 3,
    }
    assert scan(str(undisturbed), ("id", "image", "caption")).rows == 58
    records = table_of(undisturbed)
    numbers = [*range(5), *range(8, 30), *range(30, 40), *range(41, 50), *range(60, 70), 80, 81]
    assert [int(caption.split()[1]) for caption in records.column("caption").to_pylist()] == numbers
    ids = records.column("id").to_pylist()
    assert ids == sorted(ids)
    assert [identifier & (2**28 - 1) for identifier in ids[:10]] == [0, 1, 2, 3, 4, 8, 9, 0, 1, 2]
    kept = pq.read_table(source_folder / "parquet" / "a.parquet").take([*range(5), *range(8, 30)])
    for name in ("image", "score"):
        assert records.slice(0, 27).column(name).combine_chunks().equals(kept.column(name).combine_chunks())
    assert records.slice(27).column("score").null_count == 31
    assert manifest["columns"] == {field.name: str(field.type) for field in records.schema}
    assert manifest["config"]["duplicates"] == {"find": "near", "max_distance": 3}


def test_the_quarantine_says_why(undisturbed: Path) -> None:
    rows = table_of(undisturbed / "quarantine").to_pylist()
    by_key = {row["key"]: (row["reason"], row["detail"]) for row in rows}
    assert len(rows) == 12
    assert by_key["a.parquet:5"][0] == "no_image"
    assert by_key["a.parquet:6"][0] == "not_a_picture"
    assert by_key["00040"][0] == "no_image"
    kept = {row["id"]: row for row in table_of(undisturbed).select(["id", "key", "content_hash"]).to_pylist()}
    assert by_key["00027"] == (
        "duplicate",
        f"another record has the same pixels; record {_id(kept, 'a.parquet:27')} is kept",
    )
    assert by_key["46.jpg"][0] == "near_duplicate"
    assert by_key["46.jpg"][1].endswith(f"bits from that of record {_id(kept, '00046')}, which is kept")
    near = [row for row in rows if row["reason"] == "near_duplicate"]
    assert all(Image.open(io.BytesIO(row["thumbnail"])).size == (40, 40) for row in near)
    assert not {row["id"] for row in rows} & set(kept)


def _id(kept: dict[int, dict[str, Any]], key: str) -> int:
    return next(identifier for identifier, row in kept.items() if row["key"] == key)


def test_the_manifest_describes_the_files(undisturbed: Path) -> None:
    manifest = manifest_of(undisturbed)
    assert len(manifest["shards"]) > 2
    for entries, folder in ((manifest["shards"], undisturbed), (manifest["quarantine"], undisturbed / "quarantine")):
        assert sorted(entry["file"] for entry in entries) == sorted(path.name for path in folder.glob("*.parquet"))
        for entry in entries:
            content, footer = (folder / entry["file"]).read_bytes(), pq.read_metadata(folder / entry["file"])
            groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
            assert entry["row_groups"] == [group.num_rows for group in groups]
            assert (entry["rows"], entry["bytes"]) == (footer.num_rows, len(content))
            assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert max(rows for entry in manifest["shards"] for rows in entry["row_groups"]) <= 8
    assert sorted(path.name for path in undisturbed.iterdir() if path.suffix != ".parquet") == [
        "manifest.json",
        "quarantine",
    ]


def test_the_same_bytes_from_more_tasks(undisturbed: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    run_ingest(IngestConfig.from_dict(settings | {"out": str(tmp_path / "out"), "tasks": 4}))
    assert hashes(tmp_path / "out") == hashes(undisturbed)


@pytest.fixture
def closed_gate(gate: Gate) -> Iterator[Gate]:
    gate.asked = 0
    gate.is_open.clear()
    yield gate
    gate.is_open.set()


def test_killed_and_run_again_it_ends_with_the_same_bytes(
    undisturbed: Path, settings: dict[str, Any], closed_gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver and all it started are killed while a picture is fetched; then the task that fetches it in the next run."""
    out, config = tmp_path / "out", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"out": str(out), "tasks": 4}))
    command = [sys.executable, str(JOB), "--config", str(config)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    _wait(lambda: closed_gate.asked and len(list(out.glob("_ingest/judged/*.json"))) == 7, driver)
    for process in [*psutil.Process(driver.pid).children(recursive=True), driver]:
        _kill(process.pid)
    driver.wait()
    (out / "data-00000.parquet.0123.tmp").write_bytes(b"half a shard")
    with pytest.raises(ConfigError, match="unfinished records of other settings: duplicates"):
        run_ingest(IngestConfig.from_dict(settings | {"out": str(out), "duplicates": {"find": "exact"}}))

    closed_gate.asked = 0
    again = threading.Thread(target=run_ingest, args=(IngestConfig.from_dict(settings | {"out": str(out)}),))
    again.start()
    _wait(lambda: closed_gate.asked > 0)
    assert len(list(out.glob("_ingest/judged/*.json"))) == 7
    fetching = [child for child in psutil.Process().children(recursive=True) if "ray::_commit" in _title(child)]
    assert fetching
    for process in fetching:
        _kill(process.pid)
    closed_gate.is_open.set()
    again.join(120)
    assert hashes(out) == hashes(undisturbed)

    assert job.main(["--config", str(config)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]  # Ray's news of the killed come before
    first = printed.index(["rows", "in", "70"])
    assert printed[first + 1 : first + 3] == [["kept", "58"], ["quarantined:", "no_caption", "1"]]
    assert hashes(out) == hashes(undisturbed)


def _wait(condition: Callable[[], object], driver: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert driver is None or driver.poll() is None, driver.communicate()
        time.sleep(0.05)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_ids_of_the_sources_own(tmp_path: Path) -> None:
    """A repeated id stays with the row that has it first; a row without an id is no record."""
    (tmp_path / "in").mkdir()
    ids = pa.array([900, 7, None, 7, -5, 8], pa.int64())
    images = pa.array([picture(number) for number in range(100, 106)], pa.large_binary())
    table = pa.table({"image": images, "caption": list("abcdef"), "number": ids})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=3)
    source = {"kind": "parquet", "uri": f"{tmp_path}/in", "id_column": "number"}
    facts = run_ingest(IngestConfig.from_dict({"sources": [source], "out": f"{tmp_path}/out"}))
    assert facts["counts"]["quarantined"] == {"duplicate_id": 1, "no_id": 1}
    records = table_of(tmp_path / "out")
    assert records.column("id").to_pylist() == [900, 7, -5, 8]
    assert records.column("caption").to_pylist() == ["a", "b", "e", "f"]
    rows = {row["reason"]: row for row in table_of(tmp_path / "out" / "quarantine").to_pylist()}
    assert (rows["duplicate_id"]["id"], rows["duplicate_id"]["caption"]) == (7, "d")


def test_counted_ids_beside_a_sources_own(tmp_path: Path) -> None:
    """Own ids as a counter makes them do not take those that are counted, whichever source comes first."""
    for name, first in (("own", 0), ("counted", 3)):
        (tmp_path / name).mkdir()
        images = pa.array([picture(number) for number in range(first, first + 3)], pa.large_binary())
        table = pa.table({"image": images, "caption": list("abc"), "number": range(3)})
        pq.write_table(table, tmp_path / name / "a.parquet")
    own = {"kind": "parquet", "uri": f"{tmp_path}/own", "id_column": "number"}
    counted = {"kind": "parquet", "uri": f"{tmp_path}/counted", "columns": []}
    for name, sources, expected in (
        ("a", [own, counted], [0, 1, 2, 2 << 55, (2 << 55) + 1, (2 << 55) + 2]),
        ("b", [counted, own], [1 << 55, (1 << 55) + 1, (1 << 55) + 2, 0, 1, 2]),
    ):
        facts = run_ingest(IngestConfig.from_dict({"sources": sources, "out": f"{tmp_path}/{name}"}))
        assert facts["counts"]["quarantined"] == {}
        assert table_of(tmp_path / name).column("id").to_pylist() == expected


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    columns = {"image": pa.array([picture(number) for number in range(10)], pa.large_binary()), "caption": ["x"] * 10}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=5, use_dictionary=False, compression="none")
    raw = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    raw[start : start + 30] = b"\xff" * 30
    path.write_bytes(raw)
    source = {"kind": "parquet", "uri": str(path)}
    facts = run_ingest(IngestConfig.from_dict({"sources": [source], "out": f"{tmp_path}/out"}))
    assert (facts["counts"]["rows_in"], facts["counts"]["kept"]) == (10, 5)
    assert facts["counts"]["quarantined"] == {"unreadable_shard": 5}


def test_on_object_storage(
    undisturbed: Path, source_folder: Path, settings: dict[str, Any], object_store: str, tmp_path: Path
) -> None:
    root = f"{object_store}/ingest"
    for path in source_folder.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{root}/in/{path.relative_to(source_folder)}", path.read_bytes())
    sources = [s | {"uri": s["uri"].replace(str(source_folder), f"{root}/in")} for s in settings["sources"]]
    facts = run_ingest(IngestConfig.from_dict(settings | {"sources": sources, "out": f"{root}/out"}))
    assert facts["counts"] == manifest_of(undisturbed)["counts"]
    assert storage.names(f"{root}/out") == sorted(
        [entry["file"] for entry in facts["shards"]] + ["manifest.json", "quarantine"]
    )
    local, remote = table_of(undisturbed), tmp_path / "copy"
    for entry in facts["shards"]:
        storage.write_bytes(f"{remote}/{entry['file']}", storage.read_bytes(f"{root}/out/{entry['file']}"))
    assert table_of(remote).drop_columns("source").equals(local.drop_columns("source"))


def test_refusals(source_folder: Path, undisturbed: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sources: required"):
        run_ingest(IngestConfig(out=str(tmp_path)))
    with pytest.raises(DataError, match="nowhere"):
        run_ingest(
            IngestConfig.from_dict(
                {"sources": [{"kind": "folder", "uri": f"{tmp_path}/nowhere"}], "out": f"{tmp_path}/o"}
            )
        )
    lacking = f"source '{source_folder}/parquet': filter 'nsfw < 0.5': there is no column 'nsfw'"
    with pytest.raises(ConfigError, match=re.escape(lacking)):
        run_ingest(IngestConfig.from_dict(settings | {"out": f"{tmp_path}/o", "records": {"filter": "nsfw < 0.5"}}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds files that this job did not make"):
        run_ingest(IngestConfig.from_dict(settings | {"out": str(tmp_path / "mine")}))
    inside = f"out = '{source_folder}/folder/records': lies in the source folder '{source_folder}/folder'"
    with pytest.raises(ConfigError, match=re.escape(inside)):
        run_ingest(IngestConfig.from_dict(settings | {"out": f"{source_folder}/folder/records"}))
    assert not (source_folder / "folder" / "records").exists()
    before = hashes(undisturbed)
    for changed, message in (
        ({"shards": {}}, "finished records of other settings: shards"),
        ({"sources": settings["sources"][:1]}, "finished records of other settings: sources"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_ingest(IngestConfig.from_dict(settings | changed | {"out": str(undisturbed)}))
    assert hashes(undisturbed) == before
    assert not (tmp_path / "o").exists()


def test_changed_sources_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(picture(1))
    (tmp_path / "in" / "1.txt").write_text("one")
    config = IngestConfig.from_dict(
        {"sources": [{"kind": "folder", "uri": f"{tmp_path}/in"}], "out": f"{tmp_path}/out"}
    )
    facts = run_ingest(config)
    assert run_ingest(config) == facts
    (tmp_path / "in" / "2.png").write_bytes(picture(2))
    with pytest.raises(ConfigError, match="sources that have changed"):
        run_ingest(config)


def test_records_of_another_version_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(picture(1))
    (tmp_path / "in" / "1.txt").write_text("one")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".unclip-0123").write_bytes(b"")  # left by a job that was killed at its start
    sources = [{"kind": "folder", "uri": f"{tmp_path}/in"}]
    config = IngestConfig.from_dict({"sources": sources, "out": f"{tmp_path}/out"})
    manifest = run_ingest(config)
    assert storage.names(f"{tmp_path}/out") == ["data-00000.parquet", "manifest.json"]
    storage.write_json(f"{tmp_path}/out/manifest.json", manifest | {"schema_version": 0})
    with pytest.raises(ConfigError, match="finished records of another version of this format"):
        run_ingest(config)


def test_the_documented_settings_work(tmp_path: Path) -> None:
    text = (JOB.parents[1] / "docs" / "data.md").read_text()
    example = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    image = pa.array([picture(1)], pa.large_binary())
    pq.write_table(pa.table({"photo": image, "title": ["x"], "nsfw": [0.1]}), tmp_path / "0.parquet")
    for source in example["sources"]:
        source["uri"] = {"webdataset": f"{tmp_path}/*.tar", "parquet": str(tmp_path)}[source["kind"]]
    facts = run_ingest(IngestConfig.from_dict(example | {"out": f"{tmp_path}/out"}), dry_run=True)
    assert facts["columns"]["nsfw"] == "double"


def test_sources_that_do_not_go_together(tmp_path: Path) -> None:
    for name, score in (("a", [1.0]), ("b", ["high"])):
        (tmp_path / name).mkdir()
        table = pa.table({"image": pa.array([picture(1)], pa.large_binary()), "caption": ["x"], "score": score})
        pq.write_table(table, tmp_path / name / "x.parquet")
    sources = [{"kind": "parquet", "uri": f"{tmp_path}/{name}"} for name in ("a", "b")]
    with pytest.raises(DataError, match="score"):
        run_ingest(IngestConfig.from_dict({"sources": sources, "out": f"{tmp_path}/out"}))


def test_a_dry_run_lists_the_parts_and_writes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    facts = run_ingest(IngestConfig.from_dict(settings | {"out": f"{tmp_path}/out"}), dry_run=True)
    assert [part.rsplit("/", 1)[-1] for part in facts["parts"]][:4] == [
        "parquet: a.parquet#0",
        "parquet: a.parquet#1",
        "parquet: a.parquet#2",
        "pictures.tar: pictures.tar",
    ]
    assert storage.names(f"{tmp_path}/out") == []
