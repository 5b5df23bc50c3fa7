"""Jobs on a cluster that has a head without CPUs and nothing else: Ray's autoscaler brings the nodes, and takes them away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.support.bundles import save_tiny_bundle
from tests.support.cluster import wait_for
from tests.support.from_zero import cluster_from_zero, group, groups_of_nodes, status

JOBS = Path(__file__).parents[2] / "jobs"
TRAIN = "{unclip/group: train}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Its address. Sockets of Ray need a short path, which pytest's folders have not."""
    groups = {name: group(1, {"unclip/group": name}, CPU=2) for name in ("data", "train")}
    with (
        tempfile.TemporaryDirectory(prefix="u") as folder,
        cluster_from_zero(Path(folder), groups, idle_s=8) as address,
    ):
        yield address


def job(script: str, cluster: str, *settings: str) -> subprocess.CompletedProcess[str]:
    name, *recipe = script.split()
    command = [sys.executable, str(JOBS / name), *recipe, *(part for text in settings for part in ("--set", text))]
    environment = os.environ | {"RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@contextmanager
def from_no_node_to_none(cluster: str) -> Iterator[set[str]]:
    """The groups of which nodes are seen while the block runs, before and after which there are none."""
    wait_for(lambda: not groups_of_nodes(cluster), 120)
    seen: set[str] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.5):
            seen.update(groups_of_nodes(cluster))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()
    wait_for(lambda: not groups_of_nodes(cluster), 120)
    assert not status(cluster).cluster_resource_state.pending_gang_resource_requests


def test_a_stage_is_trained_on_nodes_of_its_group(cluster: str, openmoji: str, tmp_path: Path) -> None:
    places = [f"run={tmp_path}/clip", f"bundle={tmp_path}/bundle", f"data.path={openmoji}/64/train"]
    whole_node = [f"resources.node_labels={TRAIN}", "resources.cpus_per_worker=2"]
    with from_no_node_to_none(cluster) as groups:
        done = job("train_clip.py --recipe debug", cluster, *places, *whole_node, "resources.use_gpu=auto")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "clip/summary.json").read_text())["step"] == 2
    assert (tmp_path / "bundle/clip/model.safetensors").exists()
    assert groups == {"train", "data"}


def test_what_no_group_holds_is_refused_though_nodes_may_come(cluster: str, openmoji: str, tmp_path: Path) -> None:
    places = [f"run={tmp_path}/clip", "bundle=null", f"data.path={openmoji}/64/train"]
    large = [f"resources.node_labels={TRAIN}", "resources.cpus_per_worker=3", "resources.use_gpu=no"]
    with from_no_node_to_none(cluster) as groups:
        done = job("train_clip.py --recipe debug", cluster, *places, *large)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "1 workers x 3 CPUs + 1 CPUs for the data stream" in done.stderr
    assert "with unclip/group=train only: 0 CPUs on 0 nodes" in done.stderr
    assert "The autoscaler has no nodes for it, though nothing is in use" in done.stderr
    assert groups == set()


def test_records_are_ingested_and_pictures_made(cluster: str, openmoji: str, tmp_path: Path) -> None:
    save_tiny_bundle(f"{tmp_path}/tiny")
    sources = f"sources=[{{kind: parquet, uri: {openmoji}/64/train}}]"
    pictures = [f"bundle={tmp_path}/tiny", "prompt=a heart", f"out={tmp_path}/pictures", "format=parquet"]
    with from_no_node_to_none(cluster) as groups:
        ingested = job("ingest.py", cluster, sources, f"out={tmp_path}/records")
        assert ingested.returncode == 0, ingested.stdout[-3000:] + ingested.stderr[-3000:]
        made = job("generate.py", cluster, *pictures, "actors=2", "cpus_per_actor=2", f"node_labels={TRAIN}")
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    manifest = json.loads((tmp_path / "records/manifest.json").read_text())
    assert manifest["counts"]["rows_in"] == 48
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "pictures").glob("data-*.parquet")) == 1
    assert groups >= {"train"}
