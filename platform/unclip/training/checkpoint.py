"""Checkpoints that any number of workers at any ZeRO stage can write and read.

    CHECKPOINTS/step-00000100/rank-00000-of-00002-ATTEMPT.safetensors  rank-00001-of-00002-ATTEMPT.safetensors  manifest.json

Every rank writes its slices of the state by parameter name; the manifest, written last, says which file holds which
elements, its size and hashes. Rank 0 also writes what all ranks have the same: buffers, and the objective's state.
A folder without a manifest, or with files of another size, is no checkpoint. The files of every attempt to save have
names of their own, so that what an interrupted one left, or still writes, is never part of another.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from unclip.training import zero_state
from unclip.training.shards import BLOCK_BYTES, BlockCache, DamagedError, ShardFile, write_shard
from unclip.utils import storage

if TYPE_CHECKING:
    from unclip.training.engine import Engine

_FORMAT = 3
_MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint does not fit the model, could not be written, or its files are not what its manifest says."""


class SaveError(CheckpointError):
    """A checkpoint could not be written, which may work the next time."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. `manifest` holds what the `Checkpoint` properties tell, and the index of the files."""

    uri: str
    manifest: Mapping[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """What the loop stored: `step`, `samples_seen` and the like."""
        return dict(self.manifest["state"])

    @property
    def step(self) -> int:
        """The loop's step, which orders the checkpoints of a run."""
        return int(self.manifest["state"]["step"])

    @property
    def run(self) -> dict[str, Any]:
        """What wrote it: `config`, `versions` (with the git commit) and `seed`."""
        return dict(self.manifest["run"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by name."""
        return {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}

    @property
    def buffers(self) -> list[str]:
        """Names of the stored buffers."""
        return list(self.manifest["buffers"])


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint in host memory."""

    rank: int
    world_size: int
    tensors: dict[str, torch.Tensor]
    fragments: dict[str, list[int]]
    """[start, numel] of each parameter's slice."""
    facts: dict[str, Any]
    """What the manifest says beside the files; the same on all ranks."""

    def write(self, uri: str, attempt: str) -> dict[str, Any]:
        """Writes the file of this rank into the folder `uri`; returns its entry in the manifest."""
        name = f"rank-{self.rank:05d}-of-{self.world_size:05d}-{attempt}.safetensors"
        written = write_shard(storage.join(uri, name), self.tensors)
        return {"name": name, **written, "fragments": self.fragments}


class HostMemory:
    """Host memory for snapshots, the same for each: pages that were touched before take a copy several times as fast.

    On CUDA it is pinned and the copies end together.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    @torch.no_grad()
    def snapshot(
        self, engine: Engine, state: Mapping[str, Any], objective: Mapping[str, torch.Tensor] | None
    ) -> Snapshot:
        """A copy of this rank's slices, in memory that the next snapshot takes again."""
        if "step" not in state:
            raise ValueError(f"state must hold 'step', not only {sorted(state)}")
        objective, buffers = objective or {}, zero_state.buffers(engine.module)
        tensors: dict[str, torch.Tensor] = {}
        fragments: dict[str, list[int]] = {}
        used, free = 0, self._free(engine)
        for fragment in zero_state.fragments(engine):
            fragments[fragment.name] = [fragment.start, fragment.numel]
            for kind, tensor in fragment.tensors.items():
                copy = free[used : used + fragment.numel]
                tensors[f"{kind}/{fragment.name}"] = copy.copy_(tensor, non_blocking=copy.is_pinned())
                used += fragment.numel
        if engine.rank == 0:
            tensors |= {f"buffer/{name}": _copied(tensor) for name, tensor in buffers.items()}
            tensors |= {f"objective/{name}": _copied(tensor) for name, tensor in objective.items()}
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        facts = {
            "state": dict(state),
            "optimizer_steps": engine.steps,
            "parameters": {name: list(shape) for name, shape in zero_state.shapes(engine).items()},
            "buffers": sorted(buffers),
            "objective": {name: list(tensor.shape) for name, tensor in objective.items()},
        }
        return Snapshot(engine.rank, engine.world_size, tensors, fragments, facts)

    def _free(self, engine: Engine) -> torch.Tensor:
        """Float32 memory for all slices of this rank, which are the same as long as the engine lives."""
        if not self._buffer.numel():
            elements = len(zero_state.KINDS) * sum(fragment.numel for fragment in zero_state.fragments(engine))
            self._buffer = torch.empty(elements, pin_memory=engine.device.type == "cuda")
        return self._buffer


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def folder(checkpoints_uri: str, step: int) -> str:
    """Where the checkpoint of `step` belongs."""
    return storage.join(checkpoints_uri, f"step-{step:08d}")


def new_attempt() -> str:
    """A name for one attempt to save."""
    return uuid.uuid4().hex[:12]


def commit(uri: str, snapshot: Snapshot, entries: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> None:
    """Makes a checkpoint of the files that all ranks have written into `uri`. For rank 0."""
    manifest = {
        "format": _FORMAT,
        **snapshot.facts,
        "run": dict(run),
        "block_bytes": BLOCK_BYTES,
        "files": list(entries),
    }
    with storage.local_target(storage.join(uri, _MANIFEST)) as path:
        path.write_text(json.dumps(manifest) + "\n", encoding="utf-8")


def committed(checkpoints_uri: str) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    return list(_newest_first(checkpoints_uri))[::-1]


def open_committed(uri: str) -> Checkpoint | None:
    """The complete checkpoint in the folder `uri`; None where it is incomplete or missing."""
    sizes = storage.sizes(uri)
    if _MANIFEST not in sizes:
        return None
    manifest_uri = storage.join(uri, _MANIFEST)
    try:
        manifest = storage.read_json(manifest_uri)
    except FileNotFoundError:  # collected since the listing
        return None
    except ValueError as error:
        raise CheckpointError(f"{manifest_uri} is damaged: {error}; {_advice(uri)}") from None
    if manifest["format"] != _FORMAT:
        raise CheckpointError(f"{uri} has format {manifest['format']!r}; this version reads {_FORMAT}")
    complete = all(sizes.get(entry["name"]) == entry["bytes"] for entry in manifest["files"])
    return Checkpoint(uri, manifest) if complete else None


def latest(checkpoints_uri: str) -> Checkpoint | None:
    """The newest complete checkpoint of a run; None where there is none."""
    return next(_newest_first(checkpoints_uri), None)


def load(checkpoint: Checkpoint, engine: Engine) -> dict[str, torch.Tensor]:
    """Continues `engine` from `checkpoint`, whatever number of workers and ZeRO stage wrote it. Collective.

    Each rank reads its own slices only, some megabytes at a time, and checks the hash of every block it reads. Returns
    the `objective` that was saved, on the CPU.
    Raises `CheckpointError` where the model has other parameters, or a file is damaged.
    """
    _check_shapes(checkpoint, engine)
    with FragmentReader(checkpoint) as reader:
        zero_state.restore(engine, reader.read, int(checkpoint.manifest["optimizer_steps"]))
        with torch.no_grad():
            for name, buffer in zero_state.buffers(engine.module).items():
                buffer.copy_(reader.read_buffer(name))
        return {name: reader.read_objective(name) for name in checkpoint.manifest["objective"]}


def collect(checkpoints_uri: str, keep_last: int, keep_every_steps: int | None = None) -> None:
    """Deletes what interrupted saves left, and complete checkpoints but the newest `keep_last` and those of the steps
    that `keep_every_steps` divides. For rank 0, while nothing is being saved."""
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    kept = 0
    for step, uri in _folders(checkpoints_uri):
        for_good = keep_every_steps is not None and step % keep_every_steps == 0
        found = open_committed(uri) if kept < keep_last else None
        if found is not None:
            kept += 1
            for name in storage.sizes(uri).keys() - _files(found):  # of other attempts, dead or not
                storage.remove(storage.join(uri, name))
            continue
        if for_good and storage.exists(storage.join(uri, _MANIFEST)):
            continue
        # The manifest goes first: what is left after a crash is then no checkpoint.
        storage.remove(storage.join(uri, _MANIFEST))
        storage.remove(uri)


class FragmentReader:
    """Reads any slice of a checkpoint's state, some blocks of its files in memory at a time; a context manager that
    forgets them at its end. Every block is checked: `CheckpointError` names the file that is damaged."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._cache = BlockCache()
        self._files: dict[str, ShardFile] = {}
        self._entries = {entry["name"]: entry for entry in checkpoint.manifest["files"]}
        self._places: dict[str, list[tuple[int, int, str]]] = {}
        for file, entry in self._entries.items():
            for name, (start, numel) in entry["fragments"].items():
                self._places.setdefault(name, []).append((start, start + numel, file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._files.clear()
        self._cache = BlockCache()

    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Elements `start … start + numel` of a `zero_state.KINDS` of the flattened parameter, (numel,) float32."""
        stop, filled = start + numel, 0
        output = torch.empty(numel)
        for first, last, file in self._places.get(name, []):
            low, high = max(start, first), min(stop, last)
            if low < high:
                with self._naming_what_to_do():
                    self._open(file).read(f"{kind}/{name}", low - first, output[low - start : high - start])
                filled += high - low
        if filled != numel:
            raise CheckpointError(
                f"{self._checkpoint.uri}: {filled} of the {numel} elements asked of {kind} of {name!r} are stored"
            )
        return output

    def read_buffer(self, name: str) -> torch.Tensor:
        """A persistent buffer in its own shape and type."""
        return self._read_whole(f"buffer/{name}")

    def read_objective(self, name: str) -> torch.Tensor:
        """A tensor of the objective's state in its own shape and type."""
        return self._read_whole(f"objective/{name}")

    def _read_whole(self, key: str) -> torch.Tensor:
        with self._naming_what_to_do():
            return self._open(next(iter(self._entries))).read_whole(key)

    def _open(self, file: str) -> ShardFile:
        if file not in self._files:
            self._files[file] = ShardFile(
                storage.join(self._checkpoint.uri, file),
                size=self._entries[file]["bytes"],
                cache=self._cache,
                hashes=self._entries[file]["sha256"],
                block_bytes=self._checkpoint.manifest["block_bytes"],
            )
        return self._files[file]

    @contextmanager
    def _naming_what_to_do(self) -> Iterator[None]:
        try:
            yield
        except DamagedError as error:
            raise CheckpointError(f"{error}; {_advice(self._checkpoint.uri)}") from None


def _check_shapes(checkpoint: Checkpoint, engine: Engine) -> None:
    stored, wanted = checkpoint.shapes, zero_state.shapes(engine)
    differences = [
        f"{name}: stored {stored.get(name)}, model {wanted.get(name)}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if differences:
        raise CheckpointError(f"{checkpoint.uri} is of another model; {'; '.join(differences[:5])}")


def _files(checkpoint: Checkpoint) -> set[str]:
    return {_MANIFEST, *(entry["name"] for entry in checkpoint.manifest["files"])}


def _newest_first(checkpoints_uri: str) -> Iterator[Checkpoint]:
    found = (open_committed(uri) for _, uri in _folders(checkpoints_uri))
    return (checkpoint for checkpoint in found if checkpoint is not None)


def _folders(checkpoints_uri: str) -> list[tuple[int, str]]:
    """Step and address of what may be checkpoints, newest first."""
    names = (re.fullmatch(r"step-(\d{8,})", name) for name in storage.names(checkpoints_uri))
    found = [(int(name[1]), storage.join(checkpoints_uri, name[0])) for name in names if name]
    return sorted(found, reverse=True)


def _advice(uri: str) -> str:
    return f"delete the folder {uri} to go on from the checkpoint before it"
