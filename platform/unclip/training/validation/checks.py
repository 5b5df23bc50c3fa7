"""What can be wrong with a run's validation, found before the run starts."""

from __future__ import annotations

from unclip.config.base import ConfigError
from unclip.data.labels import check_labels
from unclip.data.manifest import Manifest, read_slices, scan
from unclip.models.clip import load_clip
from unclip.training.config import TrainConfig
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.validation.records import training_columns


def check_validation(config: TrainConfig) -> None:
    """Raises `ConfigError` or `DataError` where `config.validation` cannot be done for this run; writes nothing.

    `config` has absolute addresses, and an objective that is fitted to its CLIP and its classes.
    """
    validation = config.validation
    if validation.every_steps is None:
        return
    _check_prompts(config)
    if validation.label_column is not None and not isinstance(config.objective, ClipObjectiveConfig):
        raise ConfigError(f"validation.label_column = {validation.label_column!r}: only stage clip is tested zero-shot")
    if validation.data is not None:
        _check_data(config, validation.data)
    elif not validation.prompts:
        raise ConfigError("validation.data: required with validation.every_steps, but not given")
    if isinstance(config.objective, DecoderObjectiveConfig) and config.clip is not None:
        _check_clip(config, config.clip)


def _check_prompts(config: TrainConfig) -> None:
    prompts, objective = config.validation.prompts, config.objective
    if not prompts:
        return
    if not isinstance(objective, DecoderObjectiveConfig):
        raise ConfigError(f"validation.prompts: only stage decoder draws prompts, not {config.stage}")
    classes = objective.stage.classes
    for prompt in prompts:
        if classes and prompt not in classes:
            raise ConfigError(f"validation.prompts: {prompt!r} is none of the decoder's {len(classes)} classes")


def _check_data(config: TrainConfig, uri: str) -> None:
    if uri in config.data.paths.values():
        raise ConfigError(f"validation.data = {uri!r}: is a folder of the training data; hold records out")
    label = config.validation.label_column
    manifest = scan(uri, (*training_columns(config), *(() if label is None else (label,))))
    if config.objective.embedding_columns and config.data.embeddings == "columns":
        _check_embeddings(config, manifest)
    spec = config.objective.batch_spec()
    if spec.label_column is not None:
        check_labels(manifest, spec.label_column, spec.classes)
    if label is not None:
        _check_zero_shot(manifest, label, config.validation.samples)


def _check_embeddings(config: TrainConfig, manifest: Manifest) -> None:
    """Embeddings of another CLIP may have the right width and still mean nothing."""
    clip = manifest.facts.get("clip")
    if clip is None:
        raise ConfigError(
            f"validation.data = {manifest.uri!r}: does not say which CLIP its embeddings come from; write them with "
            "jobs/embed.py"
        )
    if clip["fingerprint"] != config.clip_fingerprint:
        raise ConfigError(
            f"validation.data = {manifest.uri!r}: its embeddings are of another CLIP ({clip['source']!r}, "
            f"{clip['fingerprint'][:12]}…) than the training data's ({config.clip!r}, {config.clip_fingerprint})"
        )
    if "text_states" in config.objective.embedding_columns and "text_states" not in clip:
        raise ConfigError(
            f"validation.data = {manifest.uri!r}: is without text states: write them with jobs/embed.py and text_states=true"
        )


def _check_zero_shot(manifest: Manifest, column: str, samples: int) -> None:
    """Of the records that are looked at."""
    slices: list[tuple[int, int, int]] = []
    left = samples
    for index, fragment in enumerate(manifest.fragments):
        if left > 0:
            slices.append((index, 0, min(left, fragment.rows)))
            left -= fragment.rows
    values = read_slices(manifest, slices, (column,)).column(column).to_pylist()
    labels = {str(value) for value in values if value not in (None, "")}
    if len(labels) < 2:
        raise ConfigError(
            f"validation.label_column = {column!r}: a zero-shot test needs two labels, but the first {len(values)} records of "
            f"{manifest.uri!r} have {', '.join(map(repr, labels)) or 'none'}"
        )


def _check_clip(config: TrainConfig, source: str) -> None:
    """The CLIP that scores a decoder's samples has to be there, and to be that of the embeddings."""
    try:
        fingerprint = load_clip(source).fingerprint
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"clip = {source!r}: scores of the validation need it, but it cannot be loaded: {error}"
        ) from None
    if config.clip_fingerprint not in (None, fingerprint):
        raise ConfigError(
            f"clip = {source!r}: has changed since the embeddings were made: its fingerprint is {fingerprint}, theirs "
            f"{config.clip_fingerprint}"
        )
