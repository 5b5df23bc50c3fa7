"""What a node has beside CPUs and GPUs: shared memory, disks, open files."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from unclip.cluster.checkup.result import Finding, failed, ok, warning

GIB = 2**30
SHARED_MEMORY = "/dev/shm"  # noqa: S108 the mount itself, in which nothing is made here
FEWEST_FILES, ENOUGH_FILES = 1024, 65_536
"""Open files of a process: below the first Ray fails in clusters of any size, the second is what it asks for."""
LEAST_SCRATCH, ENOUGH_SCRATCH = 1 * GIB, 20 * GIB
SLOW_DISK_MB_S = 100.0
RAY_STOPS_AT = 0.95
"""Share of a disk in use from which on Ray spills nothing more."""
_PIECE = 2**20


def open_files() -> tuple[int, int]:
    """Soft and hard limit of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def judge_open_files(soft: int, hard: int) -> Finding:
    if soft in (resource.RLIM_INFINITY, -1) or soft >= ENOUGH_FILES:
        return ok("any number of open files" if soft in (resource.RLIM_INFINITY, -1) else f"{soft} open files")
    found, advice = f"{soft} open files (hard limit {hard})", f"start Ray under `ulimit -n {ENOUGH_FILES}`"
    return failed(found, advice) if soft < FEWEST_FILES else warning(found, advice)


def shared_memory() -> int:
    """Bytes that /dev/shm may hold; 0 where there is none."""
    return shutil.disk_usage(SHARED_MEMORY).total if os.path.isdir(SHARED_MEMORY) else 0


def judge_shared_memory(total: int, object_store: float) -> Finding:
    found = f"{SHARED_MEMORY} {total / GIB:.1f} GiB, object store {object_store / GIB:.1f} GiB"
    if total < object_store:
        return failed(
            found,
            f"mount a larger {SHARED_MEMORY} (on Kubernetes an emptyDir with medium: Memory), or set --object-store-memory below "
            "it: Ray keeps its objects on disk otherwise",
        )
    return ok(found)


@dataclass(frozen=True)
class Disk:
    """A folder's file system: bytes in all and free, and MB/s of a file written through to it."""

    folder: str
    total: int
    free: int
    write_mb_s: float


def spill_folder() -> str:
    """Where this node's raylet spills objects to. The raylet is what starts workers; they are not told themselves."""
    arguments = psutil.Process().parent().cmdline()
    flag = "--fallback_directory="
    return next(argument.removeprefix(flag) for argument in arguments if argument.startswith(flag))


def spill_disk(megabytes: int) -> Disk:
    return measure_disk(spill_folder(), megabytes)


def scratch_disk(megabytes: int) -> Disk:
    """The folder of temporary files, through which files of checkpoints go on their way to an object store."""
    return measure_disk(tempfile.gettempdir(), megabytes)


def measure_disk(folder: str, megabytes: int) -> Disk:
    """Writes a file, through to the disk, and deletes it. Raises `OSError` where that is not possible."""
    usage, piece = shutil.disk_usage(folder), os.urandom(_PIECE)
    path = Path(folder) / f".unclip-{uuid.uuid4().hex}"
    try:
        with path.open("wb") as file:
            started = time.perf_counter()
            for _ in range(megabytes):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
    finally:
        path.unlink(missing_ok=True)
    return Disk(folder, usage.total, usage.free, megabytes * _PIECE / 1e6 / seconds)


def judge_spill(disk: Disk, object_store: float) -> Finding:
    found = _words(disk)
    if disk.free < (1 - RAY_STOPS_AT) * disk.total:
        return failed(
            found, f"free or enlarge it: Ray does not spill to a disk that is more than {RAY_STOPS_AT:.0%} full"
        )
    if disk.free - (1 - RAY_STOPS_AT) * disk.total < object_store:
        return warning(
            found,
            f"give it more than the object store ({object_store / GIB:.1f} GiB), with --object-spilling-directory",
        )
    return _judge_speed(disk, found)


def judge_scratch(disk: Disk) -> Finding:
    found = _words(disk)
    if disk.free < LEAST_SCRATCH:
        return failed(found, "free or enlarge it (TMPDIR names it): files of checkpoints pass through it")
    if disk.free < ENOUGH_SCRATCH:
        return warning(
            found, f"{ENOUGH_SCRATCH / GIB:.0f} GiB hold the files of large checkpoints; TMPDIR names the folder"
        )
    return _judge_speed(disk, found)


def _judge_speed(disk: Disk, found: str) -> Finding:
    if disk.write_mb_s < SLOW_DISK_MB_S:
        return warning(found, f"use a faster disk: below {SLOW_DISK_MB_S:.0f} MB/s it holds up what spills or saves")
    return ok(found)


def _words(disk: Disk) -> str:
    return f"{disk.folder}: {disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB free, written at {disk.write_mb_s:.0f} MB/s"
