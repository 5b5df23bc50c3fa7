"""The command of every RayJob, as the submitter's shell and the job's own parser read it, and the cluster that it gets."""

from __future__ import annotations

import functools
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.manifests import REPOSITORY, Object, build, leaves, name, pods, quantity, surroundings

from unclip.cluster import jobs as cluster_jobs
from unclip.cluster.embed import EmbedConfig
from unclip.cluster.preflight import Node, PreflightError, check_resources
from unclip.config import cli
from unclip.config.base import Config
from unclip.config.resources import ResourcesConfig
from unclip.generation.bulk.config import GenerateConfig
from unclip.training.config import TrainConfig

JOBS = [leaf for leaf in leaves() if leaf.partition("+")[0].endswith("jobs")]
STORAGE = "/storage"
WRITTEN = ("out", "run", "report")
"""Fields that say where a job writes what is its alone; all of them publish into one bundle."""
GIVEN = {STORAGE, *(f"{STORAGE}/{part}" for part in ("raw", "prompts.txt", "data/test", "bundle", "bundle/clip"))}
"""What users bring, and the bundle."""


class Read(BaseException):
    """Ends a job's script when it has read its command line."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config


def environment(leaf: str, job: Object) -> dict[str, str]:
    """That of the submitter, as far as the manifests say it."""
    submitter = next(pod for pod in pods(job) if pod.role == "submitter")
    maps = {found["metadata"]["name"]: found["data"] for found in surroundings(leaf) if found["kind"] == "ConfigMap"}
    named = [source["configMapRef"]["name"] for source in submitter.main.get("envFrom", []) if "configMapRef" in source]
    return {key: value for source in named for key, value in maps[source].items()} | submitter.env


def arguments(entrypoint: str, variables: Mapping[str, str]) -> list[str]:
    """The words that bash makes of an entrypoint; a variable that is not set is an error."""
    command = ["bash", "-uc", f'printf "%s\\0" {entrypoint}']
    done = subprocess.run(command, env=dict(variables), capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def read(words: Sequence[str]) -> Config:
    """What the script makes of its command line, by its own parser; nothing is started."""

    def until_read(parse: Callable[..., Any], *given: Any, **options: Any) -> None:
        raise Read(parse(*given, **options).config)

    stopping = partial(until_read, cli.parse_job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "parse_job", stopping)
        patch.setattr(cluster_jobs, "parse_job", stopping)
        patch.setattr(sys, "argv", list(words[1:]))
        with pytest.raises(Read) as stopped:
            runpy.run_path(str(REPOSITORY / words[1]), run_name="__main__")
    return stopped.value.config


@functools.cache
def read_all(jobs: str) -> Mapping[str, Config]:
    """What every RayJob of a folder would run with, by its name."""
    found = {}
    for job in build(jobs):
        variables = environment(jobs, job) | {"UNCLIP_STORAGE": STORAGE}
        words = arguments(job["spec"]["entrypoint"], variables)
        assert words[0] == "python", name(job)
        assert Path(words[1]).parent == Path("jobs"), f"{name(job)}: the image has jobs/ in its working directory"
        found[job["metadata"]["name"]] = read(words)
    return found


@pytest.fixture
def configs(jobs: str) -> Mapping[str, Config]:
    return read_all(jobs)


@pytest.fixture(params=JOBS)
def jobs(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_wrong_command_is_seen() -> None:
    variables = {"UNCLIP_STORAGE": STORAGE, "UNCLIP_RECIPE": "small"}
    good = "python jobs/train_clip.py --recipe $UNCLIP_RECIPE --set run=$UNCLIP_STORAGE/run"
    assert isinstance(read(arguments(good, variables)), TrainConfig)
    for wrong in ("--set runs=a", "--recipe huge", "--sets run=a", "--set resources.num_workers=none"):
        with pytest.raises(SystemExit):
            read(arguments(f"{good} {wrong}", variables))
    with pytest.raises(FileNotFoundError):
        read(arguments("python jobs/train_clips.py", variables))
    with pytest.raises(AssertionError, match="UNCLIP_STORE"):
        arguments("python jobs/train_clip.py --set run=$UNCLIP_STORE/run", variables)


def test_entrypoints_are_one_line(jobs: str) -> None:
    """KubeRay puts them into a line of shell."""
    for job in build(jobs):
        entrypoint = job["spec"]["entrypoint"].strip()
        assert "\n" not in entrypoint, name(job)
        assert not any(text in entrypoint for text in (";", "|", "&", "`", "$(")), name(job)


def test_every_command_is_understood(jobs: str, configs: Mapping[str, Config]) -> None:
    assert set(configs) == {job["metadata"]["name"] for job in build(jobs)}


def test_jobs_read_what_others_write(configs: Mapping[str, Config]) -> None:
    texts = {job: dict(addresses(config.to_dict())) for job, config in configs.items()}
    written = [value for found in texts.values() for key, value in found.items() if key in WRITTEN]
    assert len(set(written)) == len(written), "two jobs write to one place"
    for job, found in texts.items():
        for field, value in found.items():
            if field not in WRITTEN:
                assert value in {*GIVEN, *written}, f"{job}: {field}={value} is written by no job"


def addresses(settings: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a configuration that lies in the storage, with its field."""
    parts = (
        settings.items() if isinstance(settings, Mapping) else enumerate(settings) if isinstance(settings, list) else ()
    )
    for key, value in parts:
        yield from addresses(value, f"{field}.{key}".removeprefix("."))
    if isinstance(settings, str) and settings.startswith(STORAGE):
        yield field, settings


def nodes_of(job: Object) -> list[Node]:
    """What Ray sees of the job's cluster when all its groups are as large as they may be."""
    found = []
    for pod in pods(job):
        if pod.role == "worker":
            limits = pod.main["resources"]["limits"]
            node = Node(
                float(quantity(limits["cpu"])), float(quantity(limits.get("nvidia.com/gpu", 0))), pod.group["labels"]
            )
            found += [node] * pod.group["maxReplicas"]
    return found


def test_runs_fit_their_clusters(jobs: str, configs: Mapping[str, Config]) -> None:
    for job in build(jobs):
        config, nodes = configs[job["metadata"]["name"]], nodes_of(job)
        gpus = sum(node.gpus for node in nodes)
        if isinstance(config, TrainConfig):
            check_resources(config.resources, nodes=nodes)
            assert config.resources.num_workers <= max(gpus, 1), name(job)
        if isinstance(config, EmbedConfig):
            assert config.actors * config.gpus <= gpus, name(job)
        if isinstance(config, GenerateConfig) and config.gpus_per_actor is not None:
            assert (config.actors or 1) * config.gpus_per_actor <= gpus, name(job)


def test_a_run_that_does_not_fit_is_seen() -> None:
    job = next(job for job in build("overlays/gpu-h100/jobs") if job["metadata"]["name"] == "train-decoder")
    nodes = nodes_of(job)
    most = int(sum(node.gpus for node in nodes))
    check_resources(ResourcesConfig(num_workers=most, use_gpu="yes"), nodes=nodes)
    with pytest.raises(PreflightError):
        check_resources(ResourcesConfig(num_workers=most + 1, use_gpu="yes"), nodes=nodes)


def test_training_takes_gpus_by_whole_pods(jobs: str, configs: Mapping[str, Config]) -> None:
    for job in build(jobs):
        config = configs[job["metadata"]["name"]]
        train = next(pod for pod in pods(job) if pod.labels.get("ray.io/group") == "train")
        gpus = quantity(train.main["resources"]["limits"].get("nvidia.com/gpu", 0))
        assert (gpus == 0) == jobs.startswith("overlays/cpu-local"), name(job)
        if isinstance(config, TrainConfig) and gpus:
            assert config.resources.num_workers % gpus == 0, f"{name(job)}: GPUs of a pod are left without work"
