"""`ray job submit` against a cluster that has no unclip installed, with Ray's token authentication on."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import psutil
import pytest
from tests.support.cluster import once, step_of
from tests.support.ray_nodes import ray, ray_nodes, user_environment

from unclip.training.run_folder import RunFolder

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with this environment's packages, but not with unclip: editable installs do not carry over."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    (folder / "lib" / version / "site-packages" / "packages.pth").write_text(packages + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def cluster(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """A head node, and the environment that clients need."""
    with ray_nodes(bare_python, tmp_path_factory.mktemp("nodes"), head_cpus=4) as clients:
        yield clients


def test_unclip_is_not_in_the_clusters_environment(bare_python: Path) -> None:
    command = [str(bare_python), "-c", "import ray, torch; import unclip"]
    environment = user_environment(bare_python)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert "No module named 'unclip'" in done.stderr


def test_without_the_token_nobody_gets_in(bare_python: Path, cluster: Mapping[str, str]) -> None:
    jobs = f"{cluster['RAY_ADDRESS']}/api/jobs/"
    tokens = {"": 401, secrets.token_hex(32): 403, cluster["RAY_AUTH_TOKEN"]: 200}
    for token, status in tokens.items():
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        assert httpx.get(jobs, headers=headers, trust_env=False).status_code == status
    stranger = {name: value for name, value in cluster.items() if not name.startswith("RAY_AUTH")}
    done = _submit(bare_python, stranger | {"RAY_AUTH_MODE": "disabled"}, ["true"])
    assert done.returncode != 0
    assert "authentication" in done.stderr


def test_a_stage_is_trained_by_a_submitted_job(
    bare_python: Path, cluster: Mapping[str, str], openmoji: str, tmp_path: Path
) -> None:
    settings = [f"run={tmp_path}/clip", f"bundle={tmp_path}/bundle", f"data.path={openmoji}/64/train"]
    job = ["python", "jobs/train_clip.py", "--recipe", "debug", *(a for s in settings for a in ("--set", s))]
    done = _submit(bare_python, cluster, job)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "clip/summary.json").read_text())["step"] == 2
    assert (tmp_path / "bundle/clip/model.safetensors").exists()


def test_the_same_job_goes_on_after_its_driver_was_killed(
    bare_python: Path, cluster: Mapping[str, str], openmoji: str, tmp_path: Path
) -> None:
    run, steps = tmp_path / "clip", 300
    settings = [f"run={run}", "bundle=null", f"data.path={openmoji}/64/train"]
    settings += [f"loop.max_steps={steps}", "loop.log_every=1", "loop.checkpoint_every_s=1"]
    job = ["python", "jobs/train_clip.py", "--recipe", "debug", *(a for s in settings for a in ("--set", s))]
    with once(lambda: step_of(RunFolder(str(run))) >= 20, lambda: _kill(f"run={run}")):
        assert _submit(bare_python, cluster, job).returncode != 0
    assert not (run / "summary.json").exists()
    done = _submit(bare_python, cluster, job)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert json.loads((run / "summary.json").read_text())["step"] == steps
    records = RunFolder(str(run)).metrics()
    assert [record["step"] for record in records] == list(range(1, steps + 1))


def test_paths_that_would_be_lost_with_the_job_are_refused(bare_python: Path, cluster: Mapping[str, str]) -> None:
    done = _submit(bare_python, cluster, ["python", "jobs/train_clip.py", "--recipe", "debug"])
    assert done.returncode != 0
    assert "absolute path" in done.stdout + done.stderr


def _kill(setting: str) -> None:
    """kill -9 of the driver that was given this setting."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if command[1:2] == ["jobs/train_clip.py"] and setting in command:
            process.kill()


def _submit(python: Path, environment: Mapping[str, str], job: list[str]) -> subprocess.CompletedProcess[str]:
    command = ray(python, "job", "submit", "--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml", "--", *job)
    return subprocess.run(command, cwd=REPOSITORY, env=dict(environment), capture_output=True, text=True, timeout=300)
