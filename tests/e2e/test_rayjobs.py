"""The entrypoints of the RayJobs, submitted as KubeRay does: by a shell that expands them, to a cluster of two nodes."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.support.manifests import REPOSITORY, Object, build
from tests.support.ray_nodes import ray_nodes

from unclip.cluster.checkup.config import CHECKS
from unclip.pipelines.bundle import Bundle
from unclip.utils import storage

PYTHON = Path(sys.executable)
ORDER = (
    "ingest",
    "train-clip",
    "embed",
    "train-prior",
    "train-decoder",
    "train-upsampler-256",
    "train-upsampler-1024",
    "generate",
    "evaluate",
)
"""Each takes what those before it have made."""
PROMPTS = ("a red heart", "a green circle", "a blue square", "a yellow star", "a black cat")


@pytest.fixture(scope="module")
def rayjobs() -> Mapping[str, Object]:
    """Of the overlay without GPUs, by their names."""
    return {found["metadata"]["name"]: found for found in build("overlays/cpu-local/jobs") if found["kind"] == "RayJob"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """A head that takes no tasks and one worker, started where the jobs lie, as in the image."""
    with ray_nodes(PYTHON, tmp_path_factory.mktemp("nodes"), head_cpus=0, worker_cpus=(4,), cwd=REPOSITORY) as clients:
        yield clients


@pytest.fixture(scope="module")
def store(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What users bring: raw pictures with captions, held-out records, prompts."""
    folder = tmp_path_factory.mktemp("storage")
    shutil.copytree(f"{openmoji}/256/train", folder / "raw")
    shutil.copytree(f"{openmoji}/256/train", folder / "data/test")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return folder


def test_every_run_from_raw_pictures_to_their_evaluation(
    rayjobs: Mapping[str, Object], cluster: Mapping[str, str], store: Path
) -> None:
    for name in ORDER:
        done = submit(rayjobs[name], cluster, UNCLIP_STORAGE=str(store), UNCLIP_RECIPE="debug")
        assert done.returncode == 0, f"{name}: {done.stdout[-4000:]}{done.stderr[-2000:]}"
        assert re.search(rf"Job '{name}-\w+' succeeded", done.stdout)
    assert storage.read_json(f"{store}/data/train/manifest.json")["rows"] > 0
    bundle = Bundle.load(str(store / "bundle"))
    assert set(bundle.configs) == {"clip", "prior", "decoder", "upsampler_256", "upsampler_1024"}
    assert storage.read_json(f"{store}/generated/pictures/manifest.json")["counts"]["pictures"] == len(PROMPTS)
    assert storage.read_json(f"{store}/evaluation/pictures/result.json")["pictures"] == len(PROMPTS)


def test_a_run_that_is_refused_fails_its_job(
    rayjobs: Mapping[str, Object], cluster: Mapping[str, str], tmp_path: Path
) -> None:
    done = submit(rayjobs["embed"], cluster, UNCLIP_STORAGE=str(tmp_path), UNCLIP_RECIPE="debug")
    assert done.returncode == 1
    assert f"{tmp_path}/bundle/clip" in done.stdout


def test_the_checkup_finds_two_nodes_fit(
    rayjobs: Mapping[str, Object], cluster: Mapping[str, str], tmp_path: Path
) -> None:
    """Every check but the GPUs', the trial training among them; nothing but the report stays on the storage."""
    done = submit(rayjobs["preflight"], cluster, UNCLIP_STORAGE=str(tmp_path), UNCLIP_RECIPE="debug")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["preflight.json"]
    report = storage.read_json(f"{tmp_path}/preflight.json")
    found = {name: [result for result in report["results"] if result["check"] == name] for name in CHECKS}
    assert all(f" {name} " in done.stdout and results for name, results in found.items())
    may_warn = {"spill", "scratch", "open_files", "storage", "versions"}  # as this machine is
    statuses = {name: {result["status"] for result in results} for name, results in found.items()}
    assert {name for name, of_check in statuses.items() if of_check != {"ok"}} <= may_warn | {"gpus"}
    assert statuses["gpus"] == {"skipped"}
    names = [node["name"] for node in report["nodes"]]
    assert len(names) == 2
    for check in ("clock", "ports", "storage", "shared_memory"):
        assert [result["node"] for result in found[check]] == names
    assert all("ports of GCS, dashboard, raylet, object manager" in result["found"] for result in found["ports"])
    assert [result["found"][:23] for result in found["all_reduce"]] == ["2 ranks across 2 nodes:"]
    (training,) = (result["found"] for result in found["training"])
    assert "2 steps by 2 workers" in training
    assert "drew a picture of 64 pixels" in training


def submit(job: Object, cluster: Mapping[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs KubeRay's command in the submitter's environment, but for `environment`.

    As `BuildJobSubmitCommand` in ray-operator/controllers/ray/common/job.go joins it, for a shell as `GetContainerCommand`
    starts it; without its wait for the head, and following the log in the same command.
    """
    name, [container] = job["metadata"]["name"], job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    submission = ["ray", "job", "submit", "--address", cluster["RAY_ADDRESS"]]
    submission += ["--submission-id", f"{name}-{secrets.token_hex(3)}"]
    command = " ".join([*submission, "--", job["spec"]["entrypoint"].strip(), ";"])
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    return subprocess.run(
        ["/bin/bash", "-ce", "--", command],
        env={**cluster, **given, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
