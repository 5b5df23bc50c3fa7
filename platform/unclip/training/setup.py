"""Everything about a run that can be found out, or found wrong, before resources are claimed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unclip.config.base import ConfigError
from unclip.data.batches import BatchSpec
from unclip.data.labels import check_labels, distinct_labels
from unclip.data.manifest import DataError, Manifest, scan
from unclip.data.order import RunOrder
from unclip.models.clip import ClipModel, load_clip
from unclip.pipelines.bundle import ClipReference, check_clip
from unclip.pipelines.stages.classifier import MAX_CLASSES
from unclip.training.config import TrainConfig
from unclip.training.objectives.classifier import ClassifierObjectiveConfig
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to start: addresses absolute, objective fitted to its CLIP, records found."""

    config: TrainConfig
    manifest: Manifest
    spec: BatchSpec
    order: RunOrder


def prepare_run(config: TrainConfig) -> PreparedRun:
    """Checks `config` against its data, its CLIP, its run folder and its bundle; writes nothing.

    Raises `ConfigError` or `DataError` naming the field, the value and what would be right.
    """
    for field, value in (("run", config.run), ("data.path", config.data.path)):
        if not value:
            raise ConfigError(f"{field}: required, but not given")
    config = _with_classes(_with_absolute_paths(config))
    columns = config.data.embeddings == "columns"
    spec = config.objective.batch_spec()
    if not columns:
        spec = spec.model_copy(update={"embeddings": ()})
    manifest = scan(config.data.path, spec.columns())
    if config.objective.embedding_columns:
        identity = _clip_of_columns(config, manifest) if columns else _clip_in_stream(config)
        config = _fitted(config, identity)
        if not columns:
            spec = BatchSpec.from_dict(spec.to_dict() | identity["inputs"])
    order = _order(config, manifest)
    RunFolder(config.run).check(config)
    if config.bundle is not None:
        _check_bundle(config)
    return PreparedRun(config, manifest, spec, order)


def _check_bundle(config: TrainConfig) -> None:
    """Refuses a bundle whose stages belong to another CLIP, among them a new CLIP for a bundle that has other stages."""
    assert config.bundle is not None
    if config.stage == "clip" and RunFolder(config.run).summary() is None:
        check_clip(
            config.bundle, "clip", ClipReference(source="clip", fingerprint="of a CLIP that is still to be trained")
        )
    else:
        check_clip(config.bundle, config.stage, clip_reference(config))


def clip_reference(config: TrainConfig) -> ClipReference | None:
    """The CLIP that a prepared run's stage is trained with; None for stages that see no embeddings."""
    if config.clip is None or config.clip_fingerprint is None:
        return None
    return ClipReference(source=config.clip, fingerprint=config.clip_fingerprint)


def check_outputs(config: TrainConfig) -> None:
    """Raises `OSError` where the run folder or the bundle cannot be written. Leaves nothing behind but empty folders."""
    for field, uri in (("run", config.run), ("bundle", config.bundle)):
        if uri is not None:
            try:
                storage.check_writable(uri)
            except OSError as error:
                raise OSError(f"{field} = {error}") from None


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    changes: dict[str, Any] = {
        "run": storage.absolute(config.run),
        "data": {"path": storage.absolute(config.data.path)},
        "bundle": storage.absolute(config.bundle) if config.bundle else None,
    }
    if config.clip:
        changes["clip"] = absolute_clip(config.clip)
    return config.merged(changes)


def absolute_clip(source: str) -> str:
    """`source` as it means the same from any folder: absolute where it is a folder of ours, else a name as it is."""
    return storage.absolute(source) if storage.exists(storage.join(source, "config.json")) else source


def _with_classes(config: TrainConfig) -> TrainConfig:
    """Checks the labels of the data against the classes; where a classifier leaves those open, takes them from there."""
    spec = config.objective.batch_spec()
    if spec.label_column is None:
        return config
    manifest = scan(config.data.path, (spec.label_column,))
    if spec.classes:
        check_labels(manifest, spec.label_column, spec.classes)
        return config
    assert isinstance(config.objective, ClassifierObjectiveConfig)  # every other stage names its classes
    classes = distinct_labels(manifest, spec.label_column, at_most=MAX_CLASSES)
    if len(classes) < 2:
        raise ConfigError(
            f"objective.stage.label_column = {spec.label_column!r}: data folder {manifest.uri!r} holds only {classes[0]!r} "
            "in it; a classifier needs two classes"
        )
    return config.merged({"objective": config.objective.with_classes(classes).to_dict()})


def _clip_of_columns(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """What the embed job stored with the data about the CLIP of its embeddings."""
    facts = manifest.facts.get("clip")
    if facts is None:
        raise DataError(
            f"data folder {manifest.uri!r} does not say which CLIP its embeddings come from: write them with jobs/embed.py, "
            "or set data.embeddings=stream"
        )
    if config.clip is not None:
        fingerprint = load_clip_named(config.clip).fingerprint
        if fingerprint != facts["fingerprint"]:
            raise ConfigError(
                f"clip = {config.clip!r} (fingerprint {fingerprint[:12]}…) is not the CLIP of the embeddings in "
                f"{manifest.uri!r} ({facts['source']!r}, {facts['fingerprint'][:12]}…)"
            )
    return {**facts, "statistics": manifest.facts.get("statistics")}


def load_clip_named(source: str) -> ClipModel:
    """The CLIP that `source` names; `ConfigError` says why there is none."""
    try:
        return load_clip(source)
    except ValueError as error:
        raise ConfigError(f"clip = {source!r}: {error}") from None


def _clip_in_stream(config: TrainConfig) -> dict[str, Any]:
    assert config.clip is not None  # TrainConfig sees to it
    clip = load_clip_named(config.clip)
    inputs = {
        "clip_image_size": clip.image_size,
        "clip_tokenizer": config.clip,
        "clip_context_length": clip.context_length,
    }
    return {
        "source": config.clip,
        "fingerprint": clip.fingerprint,
        "embed_dim": clip.embed_dim,
        "statistics": None,
        "inputs": inputs,
    }


def _fitted(config: TrainConfig, clip: dict[str, Any]) -> TrainConfig:
    objective = config.objective.with_embeddings(clip["embed_dim"], clip["statistics"])
    return config.merged(
        {"objective": objective.to_dict(), "clip": clip["source"], "clip_fingerprint": clip["fingerprint"]}
    )


def _order(config: TrainConfig, manifest: Manifest) -> RunOrder:
    batch = config.loop.global_batch_size
    if manifest.rows < batch:
        raise ConfigError(
            f"loop.global_batch_size = {batch}: data folder {manifest.uri!r} has only {manifest.rows} rows"
        )
    chunk_rows = max(1, config.data.shuffle_rows // batch) * batch
    rows = [fragment.rows for fragment in manifest.fragments]
    return RunOrder(rows, config.seed, global_batch_size=batch, chunk_rows=chunk_rows)
