"""Checkpoints that any number of workers at any ZeRO stage can write and read.

    CHECKPOINTS/step-00000100/rank-00000-of-00002.safetensors  rank-00001-of-00002.safetensors  manifest.json

Every rank writes its slices of the state by parameter name; the manifest, written last, says which file holds which
elements, its size and hash. Rank 0 also writes what all ranks have the same: buffers, and the objective's state.
A folder without a manifest, or with files of another size, is no checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from unclip.training import zero_state
from unclip.utils import storage

if TYPE_CHECKING:
    from unclip.training.engine import Engine

_FORMAT = 2
_MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint does not fit the model, or its files are not what its manifest says."""


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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by name."""
        return {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}

    @property
    def buffers(self) -> list[str]:
        """Names of the stored buffers."""
        return list(self.manifest["buffers"])


def folder(checkpoints_uri: str, step: int) -> str:
    """Where the checkpoint of `step` belongs."""
    return storage.join(checkpoints_uri, f"step-{step:08d}")


def save(
    uri: str, engine: Engine, state: Mapping[str, Any], *, objective: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the training state of all ranks, and `state` (JSON values, `step` among them), as the folder `uri`.

    `objective` holds named tensors that are the same on all ranks (`Objective.state`).
    Collective: every rank calls it with the same `uri`. The checkpoint counts from when rank 0 returns.
    """
    objective = objective or {}
    if "step" not in state:
        raise ValueError(f"state must hold 'step', not only {sorted(state)}")
    entry = _write_shard(uri, engine, objective)
    entries: list[Any] = [None] * engine.world_size
    dist.all_gather_object(entries, entry)
    if engine.rank == 0:
        manifest = {
            "format": _FORMAT,
            "state": dict(state),
            "optimizer_steps": engine.steps,
            "parameters": {name: list(shape) for name, shape in zero_state.shapes(engine).items()},
            "buffers": sorted(zero_state.buffers(engine.module)),
            "objective": {name: list(tensor.shape) for name, tensor in objective.items()},
            "files": entries,
        }
        storage.write_json(storage.join(uri, _MANIFEST), manifest)


def committed(checkpoints_uri: str) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    folders = (storage.join(checkpoints_uri, name) for name in storage.names(checkpoints_uri) if _is_folder_name(name))
    found = (open_committed(uri) for uri in folders)
    return sorted((checkpoint for checkpoint in found if checkpoint), key=lambda checkpoint: checkpoint.step)


def open_committed(uri: str) -> Checkpoint | None:
    """The complete checkpoint in the folder `uri`; None where it is incomplete or missing."""
    manifest_uri = storage.join(uri, _MANIFEST)
    if not storage.exists(manifest_uri):
        return None
    manifest = storage.read_json(manifest_uri)
    if manifest["format"] != _FORMAT:
        raise CheckpointError(f"{uri} has format {manifest['format']!r}; this version reads {_FORMAT}")
    complete = all(storage.size(storage.join(uri, entry["name"])) == entry["bytes"] for entry in manifest["files"])
    return Checkpoint(uri, manifest) if complete else None


def latest(checkpoints_uri: str) -> Checkpoint | None:
    """The newest complete checkpoint of a run; None where there is none."""
    found = committed(checkpoints_uri)
    return found[-1] if found else None


def load(checkpoint: Checkpoint, engine: Engine, *, verify: bool = False) -> dict[str, torch.Tensor]:
    """Continues `engine` from `checkpoint`, whatever number of workers and ZeRO stage wrote it. Collective.

    Each rank reads its own slices only. `verify` first checks the hash of every file that the rank reads. Returns the
    `objective` that `save` was given, on the CPU.
    Raises `CheckpointError` where the model has other parameters, or a file is damaged.
    """
    _check_shapes(checkpoint, engine)
    with FragmentReader(checkpoint, verify=verify) as reader:
        zero_state.restore(engine, reader.read, int(checkpoint.manifest["optimizer_steps"]))
        with torch.no_grad():
            for name, buffer in zero_state.buffers(engine.module).items():
                buffer.copy_(reader.read_buffer(name))
        return {name: reader.read_objective(name) for name in checkpoint.manifest["objective"]}


def collect(checkpoints_uri: str, keep_last: int) -> None:
    """Deletes incomplete checkpoints and all complete ones but the newest `keep_last`. For rank 0, after a `save`."""
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    keep = {checkpoint.uri for checkpoint in committed(checkpoints_uri)[-keep_last:]}
    for name in filter(_is_folder_name, storage.names(checkpoints_uri)):
        uri = storage.join(checkpoints_uri, name)
        if uri not in keep:
            # The manifest goes first: what is left after a crash is then no checkpoint.
            storage.remove(storage.join(uri, _MANIFEST))
            storage.remove(uri)


class FragmentReader:
    """Reads any slice of a checkpoint's state; a context manager that keeps the files in use open."""

    def __init__(self, checkpoint: Checkpoint, *, verify: bool = False) -> None:
        self._checkpoint = checkpoint
        self._verify = verify
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._entries = {entry["name"]: entry for entry in checkpoint.manifest["files"]}
        self._places: dict[str, list[tuple[int, int, str]]] = {}
        for file, entry in self._entries.items():
            for name, (start, numel) in entry["fragments"].items():
                self._places.setdefault(name, []).append((start, start + numel, file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Elements `start … start + numel` of a `zero_state.KINDS` of the flattened parameter, (numel,) float32."""
        stop, filled = start + numel, 0
        output = torch.empty(numel)
        for first, last, file in self._places.get(name, []):
            low, high = max(start, first), min(stop, last)
            if low < high:
                piece = self._open(file).get_slice(f"{kind}/{name}")[low - first : high - first]
                output[low - start : high - start] = piece
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
        tensor = self._open(next(iter(self._entries))).get_tensor(key)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._stack.enter_context(storage.local_file(storage.join(self._checkpoint.uri, file)))
            if self._verify and _sha256(path) != self._entries[file]["sha256"]:
                raise CheckpointError(f"{storage.join(self._checkpoint.uri, file)} is damaged: its hash is another")
            self._files[file] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[file]


def _write_shard(uri: str, engine: Engine, objective: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes this rank's file; returns its entry of the manifest."""
    name = f"rank-{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    fragments: dict[str, list[int]] = {}
    for fragment in zero_state.fragments(engine):
        fragments[fragment.name] = [fragment.start, fragment.numel]
        tensors |= {f"{kind}/{fragment.name}": tensor.cpu() for kind, tensor in fragment.tensors.items()}
    if engine.rank == 0:
        held = zero_state.buffers(engine.module)
        tensors |= {f"buffer/{name}": tensor.cpu().contiguous() for name, tensor in held.items()}
        tensors |= {f"objective/{name}": tensor.cpu().contiguous() for name, tensor in objective.items()}
    with storage.local_target(storage.join(uri, name)) as path:
        save_file(tensors, path)
        size, digest = path.stat().st_size, _sha256(path)
    return {"name": name, "bytes": size, "sha256": digest, "fragments": fragments}


def _check_shapes(checkpoint: Checkpoint, engine: Engine) -> None:
    stored, wanted = checkpoint.shapes, zero_state.shapes(engine)
    differences = [
        f"{name}: stored {stored.get(name)}, model {wanted.get(name)}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if differences:
        raise CheckpointError(f"{checkpoint.uri} is of another model; {'; '.join(differences[:5])}")


def _is_folder_name(name: str) -> bool:
    return re.fullmatch(r"step-\d{8,}", name) is not None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
