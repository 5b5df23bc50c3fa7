"""A new run that begins with the weights of another one: `init_from`.

The source is a run folder (its newest checkpoint), a checkpoint's folder, or a stage of a bundle; its averaged weights
become both weights and average here, and nothing else is taken over.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from unclip.config.base import ConfigError
from unclip.pipelines.bundle import StageManifest
from unclip.pipelines.stages import STAGE_NAMES
from unclip.training import checkpoint, zero_state
from unclip.training.checkpoint import Checkpoint, CheckpointError, FragmentReader
from unclip.training.config import TrainConfig
from unclip.training.engine import Engine
from unclip.training.run_folder import RunFolder
from unclip.training.shards import BLOCK_BYTES, BLOCKS_AT_ONCE, BlockCache, DamagedError, ShardFile
from unclip.utils import storage

Shapes = Mapping[str, tuple[int, ...]]


class _Source(Protocol):
    """Averaged weights and buffers by name."""

    @property
    def uri(self) -> str:
        """The folder that holds just these."""

    @property
    def shapes(self) -> Shapes: ...

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements `start … start + numel` of the flattened parameter, (numel,) float32."""

    def read_buffer(self, name: str) -> torch.Tensor:
        """In its own shape and type."""

    def check_content(self) -> None:
        """Raises `CheckpointError` where the file is damaged in a way that reading would not notice."""


class _OfCheckpoint:
    def __init__(self, found: Checkpoint) -> None:
        self.uri = found.uri
        self._reader = FragmentReader(found)
        self.shapes: Shapes = found.shapes

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        return self._reader.read(name, "ema", start, numel)

    def read_buffer(self, name: str) -> torch.Tensor:
        return self._reader.read_buffer(name)

    def check_content(self) -> None:
        """Reading checks every block."""


class _OfBundle:
    """One safetensors file, of which only the hash of the whole is known."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._file_uri = storage.join(uri, "model.safetensors")
        self._stored = StageManifest.from_dict(storage.read_json(storage.join(uri, "manifest.json"))).weights
        size = storage.size(self._file_uri)
        if size != self._stored.bytes:
            raise ValueError(f"{self._file_uri} has {size} bytes, not the {self._stored.bytes} of its manifest")
        self._file = ShardFile(self._file_uri, size=self._stored.bytes, cache=BlockCache(), hashes=None)
        self.shapes: Shapes = self._file.shapes

    def read(self, name: str, start: int, numel: int) -> torch.Tensor:
        output = torch.empty(numel)
        self._file.read(name, start, output)
        return output

    def read_buffer(self, name: str) -> torch.Tensor:
        return self._file.read_whole(name)

    def check_content(self) -> None:
        digest, step = hashlib.sha256(), BLOCK_BYTES * BLOCKS_AT_ONCE
        for start in range(0, self._stored.bytes, step):
            digest.update(storage.read_ranges(self._file_uri, [(start, min(start + step, self._stored.bytes))])[0])
        if digest.hexdigest() != self._stored.sha256:
            raise CheckpointError(
                f"{self._file_uri} is damaged: its hash is not the one in its manifest; export it again"
            )


def check_source(uri: str, config: TrainConfig) -> None:
    """Raises `ConfigError` unless `uri` holds weights that a new run of `config` can begin with.

    Names and shapes must be those of the model; only a convolution may have more input channels than it had there.
    """
    field = f"init_from = {uri!r}"
    try:
        source = _open(uri)
    except (ValueError, OSError, CheckpointError, DamagedError) as error:
        raise ConfigError(f"{field}: {error}") from None
    with torch.device("meta"):
        model = config.objective.stage_config().build()
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if differences := _differences(source.shapes, wanted, zero_state.buffers(model)):
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ConfigError(
            f"{field} holds another model than stage {config.stage!r}: {'; '.join(differences[:5])}{more}"
        )


@torch.no_grad()
def initialise(engine: Engine, uri: str) -> None:
    """Gives `engine` the averaged weights of `uri`, as weights and as average; moments become zero. Collective.

    Each rank reads its own slices only; worker 0 also checks a bundle's file as a whole. Input channels that a convolution
    has more than in the source get zeros, and so its outputs are what they were (GLIDE's way to inpainting, Nichol et
    al. 2022, section 4.3). Raises `CheckpointError` where the weights do not fit or are damaged, `OSError` where they
    cannot be read.
    """
    source = _open(_agreed(engine, uri))
    wanted, buffers = zero_state.shapes(engine), zero_state.buffers(engine.module)
    if differences := _differences(source.shapes, wanted, buffers):
        raise CheckpointError(f"{uri} holds another model: {'; '.join(differences[:5])}")

    def read(name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        if kind not in ("fp32", "ema"):
            return torch.zeros(numel)
        return _read_widened(source, name, wanted[name], start, numel)

    zero_state.restore(engine, read, 0)
    for name, buffer in buffers.items():
        buffer.copy_(source.read_buffer(name))


def _open(uri: str) -> _Source:
    """What `uri` holds; an error that says why there is nothing to begin with."""
    files = storage.sizes(uri).keys()
    if {"model.safetensors", "manifest.json"} <= files:
        return _OfBundle(uri)
    if any(name.startswith("rank-") for name in files):
        found = checkpoint.open_committed(uri)
        if found is None:
            raise ValueError(
                "is an interrupted checkpoint: it has no manifest, or files of another size than that says"
            )
        return _OfCheckpoint(found)
    found = checkpoint.latest(RunFolder(uri).checkpoints_uri)
    if found is None:
        stages = [name for name in STAGE_NAMES if storage.exists(storage.join(uri, name, "manifest.json"))]
        hint = (
            f"; of a bundle, name the stage: {', '.join(storage.join(uri, name) for name in stages)}" if stages else ""
        )
        raise ValueError(f"is no run folder with a checkpoint, no checkpoint and no stage of a bundle{hint}")
    return _OfCheckpoint(found)


def _differences(stored: Shapes, wanted: Shapes, buffers: Collection[str]) -> list[str]:
    names = (stored.keys() - set(buffers)) | wanted.keys()
    return [
        f"{name}: {stored.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} here"
        for name in sorted(names)
        if stored.get(name) != wanted.get(name) and not _widened(stored.get(name), wanted.get(name))
    ]


def _widened(stored: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> bool:
    """Whether these are a convolution's kernels, (out, in, height, width), that only have more input channels now."""
    if stored is None or wanted is None or not len(stored) == len(wanted) == 4:
        return False
    return (stored[0], *stored[2:]) == (wanted[0], *wanted[2:]) and stored[1] < wanted[1]


def _read_widened(source: _Source, name: str, wanted: tuple[int, ...], start: int, numel: int) -> torch.Tensor:
    """Elements `start … start + numel` of the flattened parameter in its wanted shape, zeros where it has grown."""
    stored = source.shapes[name]
    if stored == wanted:
        return source.read(name, start, numel)
    old, new = math.prod(stored[1:]), math.prod(wanted[1:])  # elements of an output channel
    first, last = start // new, -(-(start + numel) // new)
    grown = torch.zeros(last - first, new)
    grown[:, :old] = source.read(name, first * old, (last - first) * old).view(last - first, old)
    return grown.flatten()[start - first * new :][:numel]


def _agreed(engine: Engine, uri: str) -> str:
    """The folder that rank 0 has found and checked: a run that is still trained has another newest checkpoint any time.

    Every rank raises what rank 0 finds wrong: `OSError` where the storage does not answer, else `CheckpointError`.
    """
    answer: list[Any] = [None, None]
    if engine.rank == 0:
        try:
            source = _open(uri)
            source.check_content()
            answer = [source.uri, None]
        except (ValueError, CheckpointError, DamagedError) as error:
            answer = [None, CheckpointError(f"init_from = {uri!r}: {error}")]
        except OSError as error:
            answer = [None, OSError(f"init_from = {uri!r}: {error}")]
    dist.broadcast_object_list(answer, src=0)
    found, problem = answer
    if problem is not None:
        raise problem
    return str(found)
