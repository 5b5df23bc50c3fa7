"""Joining the Ray cluster that a job was submitted to, or starting a small one on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray

import unclip
from unclip.config.base import ConfigError
from unclip.utils import storage

MAX_OBJECT_STORE_BYTES = 2 * 2**30
"""Shared memory that a local instance claims at most; a stream keeps far less than this ahead of the workers."""
_MIN_LOGICAL_CPUS = 4
_QUIET_LOGGERS = ("ray.data", "ray.train", "ray.tune")
_PACKAGE_ROOT = Path(unclip.__file__).parents[1]


@contextmanager
def session() -> Iterator[None]:
    """A connection to Ray for the block; an existing one is used and left as it is."""
    if ray.is_initialized():
        yield
        return
    connect()
    try:
        yield
    finally:
        ray.shutdown()


def joins_cluster() -> bool:
    """Whether `connect` goes to a cluster that is there, rather than start an instance on this machine."""
    return ray.is_initialized() or "RAY_ADDRESS" in os.environ


def connect() -> None:
    """Connects this process to Ray, once.

    Inside a submitted job, or with `RAY_ADDRESS` set, to that cluster. Otherwise to an instance of its own on this
    machine, which declares more logical CPUs than it has cores: workers and the data stream take turns on few cores,
    where they would wait for each other for ever if each needed a core of its own.
    """
    if ray.is_initialized():
        return
    _prepare_environment()
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.WARNING)
    else:
        # A worker process takes seconds to start; by default idle ones are ended after one second.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
        # Ray Train asks the dashboard, which is not there, how its controller is, and every run would wait 12 s at its
        # end for that question to give up; an address that refuses at once answers it.
        os.environ.setdefault("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
        ray.init(
            address="local",
            num_cpus=local_cpus(),
            object_store_memory=local_object_store_bytes(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def refuse_lost_paths(places: Mapping[str, str | None]) -> None:
    """Raises `ConfigError` for a relative path in a submitted job, which runs in a temporary folder of the head node.

    Args:
        places: addresses by the fields that hold them; what was written there would be gone with that folder.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return
    for field, uri in places.items():
        if uri and storage.is_local(uri) and not os.path.isabs(uri.removeprefix("file://")):
            raise ConfigError(f"{field} = {uri!r}: a submitted job needs an absolute path or an s3:// address")


def local_cpus() -> int:
    """Logical CPUs of a local instance: two for each core this process may use, at least 4."""
    return max(_MIN_LOGICAL_CPUS, 2 * len(os.sched_getaffinity(0)))


def local_object_store_bytes() -> int:
    """Shared memory of a local instance: 30 % of the machine's memory, at most 2 GiB."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(MAX_OBJECT_STORE_BYTES, int(0.3 * memory))


def _prepare_environment() -> None:
    """Settings that Ray and the workers read from the environment; what the user has set stays."""
    # By default Ray Train looks after its workers every 2 s, which is also how late it sees that they are done.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # Worker 0 looks for nodes that will be taken away, and saves; Ray Train would only wait for their end.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # By default Ray runs its workers at niceness 15, where anything else on the machine starves them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Workers start from a shell's PATH: extensions that compile there must find this environment's tools first.
    _prepend_path("PATH", str(Path(sys.executable).parent))
    _prepend_path("PYTHONPATH", str(_PACKAGE_ROOT))


def _prepend_path(variable: str, folder: str) -> None:
    parts = [part for part in os.environ.get(variable, "").split(os.pathsep) if part and part != folder]
    os.environ[variable] = os.pathsep.join([folder, *parts])
