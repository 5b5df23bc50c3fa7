"""All kinds of bad input, each among good rows: it gets its reason, and the good rows come out as they went in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.support.corpus import EMBEDDING, BadRow, BadShard, good_row, row_cases, shard_cases, table
from tests.support.corpus_shards import good_parquet, good_tar, pictures

from unclip.data.ingest.records import RecordPolicy, judge
from unclip.data.sources import ParquetSourceConfig, WebDatasetSourceConfig

POLICY = RecordPolicy.from_dict({"captions": {"min_length": 2}, "embeddings": {"vector": len(EMBEDDING)}})
ROWS = list(row_cases())
SHARDS = list(shard_cases())


def judged(raw: pa.Table, policy: RecordPolicy = POLICY) -> tuple[pa.Table, pa.Table]:
    kept, rejected = judge(raw, np.arange(raw.num_rows), "source", "part", policy)
    assert kept.num_rows + rejected.num_rows == raw.num_rows
    return kept, rejected


def test_there_are_enough_kinds() -> None:
    assert len({case.name for case in ROWS}) == len(ROWS) >= 60
    assert len({case.name for case in SHARDS}) == len(SHARDS) >= 30


@pytest.fixture(scope="module")
def good() -> dict[str, dict[str, object]]:
    """What becomes of two good rows alone, without their ids."""
    kept, _ = judged(table([good_row(0), good_row(1)]))
    return {row["key"]: row for row in kept.drop_columns(["id"]).to_pylist()}


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_rows(case: BadRow, good: dict[str, dict[str, object]]) -> None:
    bad = good_row(2) | {"key": "bad"} | case.changes
    kept, rejected = judged(table([good_row(0), bad, good_row(1)]))
    arrived = {row["key"]: row for row in kept.drop_columns(["id"]).to_pylist()}
    assert {key: arrived[key] for key in good} == good
    assert ("bad" in arrived) == (case.reason is None)
    found = [(row["id"], row["key"], row["reason"]) for row in rejected.to_pylist()]
    assert found == ([] if case.reason is None else [(1, "bad", case.reason)])
    assert all(rejected["detail"].to_pylist())
    kept.validate(full=True)
    rejected.validate(full=True)


def test_all_rows_at_once_give_the_same() -> None:
    rows = [good_row(3) | {"key": case.name} | case.changes for case in ROWS]
    kept, rejected = judged(table(rows))
    assert kept["key"].to_pylist() == [case.name for case in ROWS if case.reason is None]
    assert dict(zip(rejected["key"].to_pylist(), rejected["reason"].to_pylist(), strict=True)) == {
        case.name: case.reason for case in ROWS if case.reason is not None
    }


@pytest.mark.parametrize("case", SHARDS, ids=lambda case: case.name)
def test_shards(case: BadShard, tmp_path: Path) -> None:
    is_parquet = case.suffix == ".parquet"
    write = good_parquet if is_parquet else good_tar
    write(tmp_path / f"a{'.parquet' if is_parquet else '.tar'}", 0)
    case.make(tmp_path / f"b{case.suffix}")
    write(tmp_path / f"c{'.parquet' if is_parquet else '.tar'}", 10)
    config = (ParquetSourceConfig if is_parquet else WebDatasetSourceConfig)(uri=str(tmp_path))
    source = config.build()
    reasons: Counter[str | None] = Counter()
    images: dict[str, list[bytes]] = {"a": [], "c": []}
    for part in source.parts():
        for raw in source.read(part):
            kept, rejected = judged(raw, RecordPolicy())
            images.get(part.name[0], []).extend(kept["image"].to_pylist())
            if part.name[0] == "b":
                reasons.update(rejected["reason"].to_pylist())
                reasons[None] += kept.num_rows
                assert all(rejected["detail"].to_pylist())
            else:
                assert rejected.num_rows == 0
    assert images == {"a": pictures(0), "c": pictures(10)}
    assert +reasons == Counter(case.reasons)


def test_no_case_takes_long_or_much_memory(tmp_path: Path) -> None:
    """In a process of its own, whose high-water mark is of these cases alone."""
    rows = table([good_row(0), *(good_row(2) | {"key": case.name} | case.changes for case in ROWS)])
    with pa.ipc.new_file(tmp_path / "rows.arrow", rows.schema) as file:
        file.write_table(rows, 1)
    (tmp_path / "policy.json").write_text(json.dumps(POLICY.to_dict()))
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    count, slowest, megabytes = (float(value) for value in run.stdout.split())
    assert count == len(ROWS)
    assert slowest < 2.0  # seconds of processor time
    assert megabytes < 200.0


MEASURE = """
import json, resource, sys, time
import numpy as np, pyarrow as pa
from unclip.data.ingest.records import RecordPolicy, judge
folder = sys.argv[1]
policy = RecordPolicy.from_dict(json.load(open(f"{folder}/policy.json")))
file = pa.ipc.open_file(f"{folder}/rows.arrow")
good, *cases = [pa.Table.from_batches([file.get_batch(index)]) for index in range(file.num_record_batches)]
judge(good, np.arange(1), "source", "part", policy)
before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
for case in cases:
    start = time.process_time()
    judge(case, np.arange(1), "source", "part", policy)
    slowest = max(slowest, time.process_time() - start)
print(len(cases), slowest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
