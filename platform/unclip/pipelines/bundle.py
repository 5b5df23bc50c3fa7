"""A bundle: what training exports and inference loads.

`BUNDLE/STAGE/` holds `config.json`, `model.safetensors` (EMA weights) and `manifest.json`: sizes and hashes of the other
two, and the CLIP that the stage was trained with. The manifest is written last and deleted first, so a stage without one is
not there, whatever was killed in between; and as a stage touches nothing outside its folder, stages may be exported at the
same time. Nothing in a bundle is ever unpickled.

A bundle is a folder, a prefix on an object store, or a repository of the Hugging Face hub by its name, `hf-hub:ORG/NAME` or
`hf-hub:ORG/NAME@REVISION`. Of a repository nothing but these files is fetched, each stage's weights when they are asked for,
and all of one commit.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.config.base import Config, ConfigError
from unclip.models.clip import ClipModel, load_clip
from unclip.pipelines.stages import STAGE_NAMES, StageConfig, StageName, stage_config_from_dict
from unclip.pipelines.stages.probing import probe_outputs
from unclip.utils import storage
from unclip.utils.hashing import sha256_file
from unclip.utils.hub import HUB_PREFIX, hub_folder, parse_hub

SCHEMA_VERSION = 2
_MAX_ATTRIBUTION = 400
"""Characters: what a line or two below a sheet of pictures hold."""
_CONFIG, _WEIGHTS, _MANIFEST = "config.json", "model.safetensors", "manifest.json"
_SETTINGS = tuple(f"{name}/{file}" for name in STAGE_NAMES for file in (_CONFIG, _MANIFEST))
_MAX_SETTINGS = 2**24
"""Bytes of a configuration or manifest in a repository that anybody may have made."""


class BundleError(ValueError):
    """A bundle is missing, damaged, of another version, or would mix stages that do not belong together."""


class ClipReference(Config):
    """The CLIP whose embeddings a bundle's stages were trained with."""

    source: str
    """What `load_clip` takes; used where the bundle has no `clip` stage of its own."""
    fingerprint: str = Field(min_length=1)
    """Hash of its weights and architecture."""


class StoredFile(Config):
    """One file of a stage."""

    bytes: int = Field(ge=0)
    """Size."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the content."""


class StageManifest(Config):
    """The content of `STAGE/manifest.json`."""

    schema_version: Literal[2] = 2
    """Version of this layout."""
    clip: ClipReference | None
    """The CLIP that the stage was trained with, or is; none outside any CLIP's space."""
    config: StoredFile
    """STAGE/config.json."""
    weights: StoredFile
    """STAGE/model.safetensors."""
    provenance: dict[str, Any]
    """Where it came from: run, step, samples seen, versions, attributions of its data; for people to read."""
    probe: dict[str, tuple[float, ...]] | None = None
    """Some of what its network computed when it was saved, by output, see `unclip.pipelines.probe`."""


Manifests = Mapping[StageName, StageManifest]
"""The stages that are there, in the order of `STAGE_NAMES`."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifests, configurations and file sizes were found right; weights are read when asked for.

    uri: absolute; of a repository of the hub with the commit that it was found at.
    """

    uri: str
    manifests: Manifests
    configs: Mapping[StageName, StageConfig]

    @classmethod
    def load(cls, uri: str) -> Bundle:
        """Reads everything but the weights; `BundleError` names the file where something is not as it should be."""
        uri, folder = _found(uri)
        manifests = _read_manifests(folder)
        if not manifests:
            raise BundleError(f"{uri!r} is no bundle: none of {', '.join(STAGE_NAMES)} in it has a {_MANIFEST}")
        for name, manifest in manifests.items():
            _check_same_clip(uri, manifests, name=name, clip=manifest.clip)
        configs = {name: _read_config(folder, name, manifest) for name, manifest in manifests.items()}
        if not uri.startswith(HUB_PREFIX):  # whose weights are not there yet
            for name, manifest in manifests.items():
                _check_weights_size(uri, name, manifest)
        return cls(uri=uri, manifests=manifests, configs=configs)

    @property
    def clip(self) -> ClipReference | None:
        """The CLIP of all stages that have one; none while there is no such stage."""
        references = [manifest.clip for manifest in self.manifests.values() if manifest.clip is not None]
        return references[0] if references else None

    @property
    def digest(self) -> str:
        """Hash of all stages' configurations and weights: the same for the same pictures."""
        content = {name: [entry.config.sha256, entry.weights.sha256] for name, entry in sorted(self.manifests.items())}
        fingerprint = self.clip.fingerprint if self.clip else None
        return hashlib.sha256(json.dumps([fingerprint, content]).encode()).hexdigest()

    @property
    def attribution(self) -> str:
        """What the licences of its training data want said beside its pictures; empty where no stage says any."""
        said = [entry.provenance.get("attributions") for entry in self.manifests.values()]
        texts = [str(text) for texts in said if isinstance(texts, list) for text in texts]
        return " ".join(dict.fromkeys(texts))[:_MAX_ATTRIBUTION]

    def load_model(self, name: StageName) -> nn.Module:
        """The network of a stage with its weights, on the CPU, in evaluation mode and frozen.

        Raises `BundleError` where the stage is missing, or its weights do not have the stored hash or do not fit its
        configuration exactly.
        """
        if name not in self.configs:
            raise BundleError(f"{self.uri!r} has no stage {name!r}; it has {', '.join(self.configs) or 'none'}")
        uri = _weights(self.uri, name, self.manifests[name])
        with storage.local_file(uri) as path:
            if _describe_file(path) != self.manifests[name].weights:
                raise BundleError(f"{uri!r} is damaged: its hash is not the one in {_MANIFEST}; export the stage again")
            try:
                tensors = load_file(path)
            except SafetensorError as error:
                raise BundleError(f"{uri!r} cannot be read: {error}") from None
        _check_tensors(uri, self.configs[name], tensors)
        model = self.configs[name].build()
        model.load_state_dict(tensors)
        return model.eval().requires_grad_(False)

    def load_clip(self) -> ClipModel:
        """The bundle's CLIP: its own `clip` stage, or the model it names; `BundleError` unless its fingerprint fits."""
        if self.clip is None:
            raise BundleError(f"{self.uri!r} names no CLIP: it has neither a prior nor a decoder nor a clip stage")
        source = storage.join(self.uri, "clip") if "clip" in self.configs else self.clip.source
        clip = self.load_model("clip") if "clip" in self.configs else load_clip(source)
        assert isinstance(clip, ClipModel)
        if clip.fingerprint != self.clip.fingerprint:
            raise BundleError(
                f"{self.uri!r} was trained with the CLIP of fingerprint {self.clip.fingerprint}, "
                f"but {source!r} has {clip.fingerprint}"
            )
        return clip


def _found(uri: str) -> tuple[str, str]:
    """A bundle's address for good, and the folder that has its manifests and configurations."""
    try:
        name = parse_hub(uri)
        if name is None:
            uri = storage.absolute(uri)
            return uri, uri
        if name.path is not None:
            raise ValueError(f"a bundle is a whole repository, not {name.path!r} in one")
        folder = hub_folder(name, _SETTINGS, at_most=_MAX_SETTINGS)
    except (OSError, ValueError) as error:
        raise BundleError(f"{uri!r}: {_first_line(error)}") from None
    return f"{HUB_PREFIX}{name.repo}@{folder.name}", str(folder)


def _weights(uri: str, stage: StageName, manifest: StageManifest) -> str:
    """Where a stage's weights are; those of a repository are fetched, no more bytes than the manifest says."""
    name = parse_hub(uri)
    if name is None:
        return storage.join(uri, stage, _WEIGHTS)
    file = f"{stage}/{_WEIGHTS}"
    try:
        return storage.join(str(hub_folder(name, [file], at_most=manifest.weights.bytes)), file)
    except OSError as error:
        raise BundleError(f"{uri!r}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def save_stage(
    bundle_uri: str,
    stage_config: StageConfig,
    *,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    clip: ClipReference | None,
    provenance: Mapping[str, Any],
) -> None:
    """Adds a stage to a bundle, or replaces it; the bundle is made where there is none.

    Args:
        bundle_uri: folder or object-store prefix.
        stage_config: the stage; its `kind` is its name in the bundle.
        tensors: exactly the state dictionary of `stage_config.build()`, with EMA weights.
        clip: the CLIP that the stage was trained with (or that it is, for the clip stage); None unless `in_clip_space`.
        provenance: plain JSON values that say where the weights come from.

    Raises `BundleError` where the tensors do not fit the configuration or compute nothing finite, or other stages belong to
    another CLIP.
    """
    bundle_uri, name = storage.absolute(bundle_uri), stage_config.kind
    if (clip is not None) != stage_config.in_clip_space:
        needed = "needs the CLIP that it was trained with" if stage_config.in_clip_space else "sees nothing of a CLIP"
        raise BundleError(f"stage {name!r}: clip = {clip!r}; this stage {needed}")
    check_clip(bundle_uri, name, clip)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in dict(tensors).items()}
    probe = _probed(storage.join(bundle_uri, name), stage_config, state)
    with _stage_folder(storage.join(bundle_uri, name)) as folder:
        (folder / _CONFIG).write_text(stage_config.to_json(), encoding="utf-8")
        save_file(state, folder / _WEIGHTS)
        manifest = StageManifest(
            clip=clip,
            config=_describe_file(folder / _CONFIG),
            weights=_describe_file(folder / _WEIGHTS),
            provenance=dict(provenance),
            probe=probe,
        )
        (folder / _MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def check_clip(bundle_uri: str, name: StageName, clip: ClipReference | None) -> None:
    """Raises `BundleError` where `save_stage` would refuse stage `name` for its CLIP: worth knowing before it is trained."""
    uri = storage.absolute(bundle_uri)
    _check_same_clip(uri, _read_manifests(uri), name=name, clip=clip)


@contextmanager
def _stage_folder(uri: str) -> Iterator[Path]:
    """An empty local folder that becomes `uri` when the block ends without an error."""
    if storage.is_local(uri):
        mark = uuid.uuid4().hex
        made, replaced = Path(f"{uri}.{mark}.tmp"), Path(f"{uri}.{mark}.old")
        made.mkdir(parents=True)
        try:
            yield made
            if Path(uri).exists():
                Path(uri).rename(replaced)  # away in one step: deleting it file by file could be cut short
            made.rename(uri)
        finally:
            shutil.rmtree(made, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="unclip-stage-") as name:
        yield Path(name)
        fs, path = storage.filesystem(uri)
        fs.invalidate_cache()  # another process may have written the manifest that has to go first
        storage.remove(storage.join(uri, _MANIFEST))
        for file in (_CONFIG, _WEIGHTS, _MANIFEST):
            fs.put_file(str(Path(name, file)), storage.join(path, file))


def _check_same_clip(uri: str, manifests: Manifests, *, name: StageName, clip: ClipReference | None) -> None:
    for other, manifest in manifests.items():
        theirs = manifest.clip
        if other == name or clip is None or theirs is None or theirs.fingerprint == clip.fingerprint:
            continue
        raise BundleError(
            f"{uri!r}: stage {name!r} belongs to the CLIP with fingerprint {clip.fingerprint}, but stage {other!r} "
            f"there to {theirs.fingerprint}; their embeddings do not match, so export it to a bundle of its own"
        )


def _read_manifests(uri: str) -> dict[StageName, StageManifest]:
    """The manifest of every stage that is there."""
    found = {name: _read_manifest(storage.join(uri, name, _MANIFEST)) for name in STAGE_NAMES}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def _read_manifest(path: str) -> StageManifest | None:
    try:
        data = _parse_object(path, storage.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path!r}: schema_version = {version!r}; this version of unclip reads {SCHEMA_VERSION}")
    try:
        return StageManifest.from_dict(data)
    except ConfigError as error:
        raise BundleError(f"{path!r}: {error}") from None


def _read_config(uri: str, name: StageName, manifest: StageManifest) -> StageConfig:
    path = storage.join(uri, name, _CONFIG)
    try:
        content = storage.read_bytes(path)
        config = stage_config_from_dict(_parse_object(path, content))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path!r} is missing; export the stage again") from None
    except ConfigError as error:
        raise BundleError(f"{path!r}: {error}") from None
    if config.kind != name:
        raise BundleError(f"{path!r}: kind = {config.kind!r}, but the folder is that of stage {name!r}")
    if hashlib.sha256(content).hexdigest() != manifest.config.sha256:
        raise BundleError(f"{path!r} is not the file that was exported: its hash is not the one in {_MANIFEST}")
    return config


def _check_weights_size(uri: str, name: StageName, manifest: StageManifest) -> None:
    path = storage.join(uri, name, _WEIGHTS)
    size = storage.size(path)
    if size != manifest.weights.bytes:
        found = "is missing" if size is None else f"has {size} bytes instead of {manifest.weights.bytes}"
        raise BundleError(f"{path!r} {found}; export the stage again")


def _parse_object(path: str, content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise BundleError(f"{path!r} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{path!r} must hold a JSON object, not {type(data).__name__}")
    return data


def _describe_file(path: Path) -> StoredFile:
    return StoredFile(bytes=path.stat().st_size, sha256=sha256_file(path))


def _probed(uri: str, config: StageConfig, state: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, ...]]:
    """What the network of `config` computes with `state`, in float32; `BundleError` where that does not go."""
    _check_tensors(uri, config, state)
    with torch.device("meta"):
        model = config.build()
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    model.load_state_dict(state, assign=True)  # no second copy, and no random numbers for weights that are there
    if any(buffer.is_meta for buffer in model.buffers()):  # those that no state holds, as masks
        model = config.build()
        model.load_state_dict(state)
    probe = probe_outputs(config, model.eval(), torch.device("cpu"))
    broken = [name for name, values in probe.items() if not all(map(math.isfinite, values))]
    if broken:
        raise BundleError(f"{uri!r}: its network's output {', '.join(broken)} is not finite")
    return probe


def _check_tensors(uri: str, config: StageConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises `BundleError` unless `tensors` are the network's state: the same names, each with its shape.

    Nothing of the network is allocated: what a foreign configuration asks for is no more than the file has.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = config.build()
    except (RuntimeError, TypeError) as error:  # how torch refuses sizes beyond 64 bits, of bytes and of an argument
        raise BundleError(f"{uri!r}: the configuration makes no network: {_first_line(error)}") from None
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    problems = [f"{key} is missing" for key in sorted(expected.keys() - found.keys())]
    problems += [f"{key} is unknown" for key in sorted(found.keys() - expected.keys())]
    problems += [
        f"{key} has shape {found[key]} instead of {shape}"
        for key, shape in expected.items()
        if found.get(key, shape) != shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BundleError(f"{uri!r}: the weights do not fit the configuration: {'; '.join(problems[:5])}{more}")
