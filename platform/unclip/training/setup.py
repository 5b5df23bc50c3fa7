"""Everything about a run that can be found out, or found wrong, before resources are claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unclip.config.base import ConfigError
from unclip.data.batches import BatchSpec
from unclip.data.embedding import clip_inputs
from unclip.data.labels import check_labels, distinct_labels
from unclip.data.manifest import DataError, Manifest, check_same_types, records_identity, scan
from unclip.data.order import RunOrder, batch_shares
from unclip.models.clip import ClipModel
from unclip.pipelines.bundle import ClipReference, check_clip
from unclip.pipelines.clips import absolute_clip, load_clip_named
from unclip.pipelines.stages.classifier import MAX_CLASSES
from unclip.training import checkpoint
from unclip.training.config import TrainConfig
from unclip.training.initialise import check_source
from unclip.training.objectives.classifier import ClassifierObjectiveConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to start: addresses absolute, objective fitted to its CLIP, records of every source found."""

    config: TrainConfig
    manifests: tuple[Manifest, ...]
    spec: BatchSpec
    order: RunOrder

    @property
    def attributions(self) -> list[str]:
        """What the licences of the records want said, where their manifests say it."""
        said = (manifest.facts.get("attribution") for manifest in self.manifests)
        return list(dict.fromkeys(text for text in said if isinstance(text, str)))

    def data_facts(self, samples_seen: int) -> list[dict[str, Any]]:
        """What may be told of each source in public: its name, licence and size, and how much of it was trained on."""
        return [
            {
                "name": manifest.facts.get("source") or manifest.uri.rsplit("/", 1)[-1],
                "licence": manifest.facts.get("licence"),
                "rows": report["rows"],
                "samples": report["samples"],
                "identity": records_identity(manifest),
            }
            for manifest, report in zip(self.manifests, self.data_report(samples_seen), strict=True)
        ]

    def data_report(self, samples_seen: int) -> list[dict[str, Any]]:
        """What a run that saw so many samples has trained of each source; plain JSON values.

        `left_out` rows are what each epoch skips, others in each; `untrained` rows are those of the epoch under way whose
        turn was still to come.
        """
        taken = self.order.taken(samples_seen // self.order.global_batch_size)
        report = []
        for manifest, source, samples in zip(self.manifests, self.order.sources, taken, strict=True):
            epochs, begun = divmod(samples, source.samples_per_epoch)
            report.append(
                {
                    "path": manifest.uri,
                    "rows": source.rows,
                    "samples": samples,
                    "whole_epochs": epochs,
                    "left_out": source.remainder,
                    "untrained": source.samples_per_epoch - begun if begun else 0,
                }
            )
        return report


def prepare_run(config: TrainConfig) -> PreparedRun:
    """Checks `config` against its data, its CLIP, its run folder and its bundle; writes nothing.

    Raises `ConfigError` or `DataError` naming the field, the value and what would be right.
    """
    for field, value in ({"run": config.run} | config.data.paths).items():
        if not value:
            raise ConfigError(f"{field}: required, but not given")
    config = _with_classes(_with_absolute_paths(config))
    columns = config.data.embeddings == "columns"
    spec = config.objective.batch_spec()
    if not columns:
        spec = spec.model_copy(update={"embeddings": ()})
    manifests = _scan_all(config, spec.columns())
    check_same_types(manifests, spec.columns())
    if config.objective.embedding_columns:
        identity = _clip_of_columns(config, manifests) if columns else _clip_in_stream(config)
        config = _fitted(config, identity)
        if not columns:
            spec = BatchSpec.from_dict(spec.to_dict() | identity["inputs"])
    order = _order(config, manifests)
    config = config.merged({"data_identity": [records_identity(manifest) for manifest in manifests]})
    RunFolder(config.run).check(config)
    check_beginning(config)
    if config.bundle is not None:
        _check_bundle(config)
    return PreparedRun(config, manifests, spec, order)


def check_beginning(config: TrainConfig) -> None:
    """Raises `ConfigError` where what the run should go on with, or begin with, is not there or does not fit."""
    try:
        newest = checkpoint.latest(RunFolder(config.run).checkpoints_uri)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"run = {config.run!r}: {error}") from None
    if config.resume == "require" and newest is None:
        raise ConfigError(
            f"resume = 'require': run = {config.run!r} holds no complete checkpoint; set resume=auto to begin a new run"
        )
    if config.resume == "refuse" and newest is not None:
        raise ConfigError(
            f"resume = 'refuse': run = {config.run!r} holds a checkpoint of step {newest.step}; choose another run "
            "folder, or set resume=auto to go on with it"
        )
    if newest is None and config.init_from is not None:
        check_source(config.init_from, config)


def _check_bundle(config: TrainConfig) -> None:
    """Refuses a bundle whose stages belong to another CLIP, among them a new CLIP for a bundle that has other stages."""
    assert config.bundle is not None
    if config.stage == "clip" and RunFolder(config.run).summary_of(config.loop) is None:
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
        "data": {
            "path": storage.absolute(config.data.path),
            "others": [other.merged({"path": storage.absolute(other.path)}).to_dict() for other in config.data.others],
        },
        "bundle": storage.absolute(config.bundle) if config.bundle else None,
        "init_from": storage.absolute(config.init_from) if config.init_from else None,
        "validation": {"data": storage.absolute(config.validation.data) if config.validation.data else None},
    }
    if config.clip:
        changes["clip"] = absolute_clip(config.clip)
    return config.merged(changes)


def _scan_all(config: TrainConfig, columns: Sequence[str]) -> tuple[Manifest, ...]:
    """What each source holds."""
    fields: dict[str, str] = {}
    for field, path in config.data.paths.items():
        if path in fields:
            raise ConfigError(f"{field} = {path!r}: is {fields[path]} already")
        fields[path] = field
    return tuple(scan(path, columns) for path in fields)


def _with_classes(config: TrainConfig) -> TrainConfig:
    """Checks the labels of the data against the classes; where a classifier leaves those open, takes them from there."""
    spec = config.objective.batch_spec()
    if spec.label_column is None:
        return config
    manifests = _scan_all(config, (spec.label_column,))
    if spec.classes:
        for manifest in manifests:
            check_labels(manifest, spec.label_column, spec.classes)
        return config
    assert isinstance(config.objective, ClassifierObjectiveConfig)  # every other stage names its classes
    found = [distinct_labels(manifest, spec.label_column, at_most=MAX_CLASSES) for manifest in manifests]
    classes = tuple(sorted(set().union(*found)))
    if not 2 <= len(classes) <= MAX_CLASSES:
        folders = ", ".join(repr(manifest.uri) for manifest in manifests)
        raise ConfigError(
            f"objective.stage.label_column = {spec.label_column!r}: data folder {folders} holds "
            + (
                f"only {classes[0]!r} in it; a classifier needs two classes"
                if len(classes) < 2
                else f"{len(classes)} classes in it; a classifier has at most {MAX_CLASSES}"
            )
        )
    return config.merged({"objective": config.objective.with_classes(classes).to_dict()})


def _clip_of_columns(config: TrainConfig, manifests: Sequence[Manifest]) -> dict[str, Any]:
    """What the embed job stored with the data about the CLIP of its embeddings; one CLIP for all sources."""
    clips = [_stored_clip(manifest) for manifest in manifests]
    for manifest, clip in zip(manifests, clips, strict=True):
        if clip["fingerprint"] != clips[0]["fingerprint"]:
            raise ConfigError(
                f"data.others: the embeddings in {manifest.uri!r} are of another CLIP ({_named(clip)}) than those in "
                f"{manifests[0].uri!r} ({_named(clips[0])})"
            )
        _check_text_states(config, clip, f"the embeddings in {manifest.uri!r}")
    if config.clip is not None:
        fingerprint = load_clip_named(config.clip).fingerprint
        if fingerprint != clips[0]["fingerprint"]:
            raise ConfigError(
                f"clip = {config.clip!r} (fingerprint {fingerprint[:12]}…) is not the CLIP of the embeddings in "
                f"{manifests[0].uri!r} ({_named(clips[0])})"
            )
    statistics = [manifest.facts.get("statistics") for manifest in manifests]
    return {**clips[0], "statistics": mixed_statistics(statistics, config.data.weights)}


def _stored_clip(manifest: Manifest) -> dict[str, Any]:
    clip = manifest.facts.get("clip")
    if clip is None:
        raise DataError(
            f"data folder {manifest.uri!r} does not say which CLIP its embeddings come from: write them with jobs/embed.py, "
            "or set data.embeddings=stream"
        )
    return dict(clip)


def clip_facts(clip: ClipModel, source: str, *, text_states: bool) -> dict[str, Any]:
    """What there is to know of a CLIP beside its embeddings: `source`, `fingerprint` and `embed_dim`; where its text
    states are wanted, `text_states` with `context_length` and `state_dim`.

    Raises `ConfigError` where it has no such states.
    """
    facts: dict[str, Any] = {"source": source, "fingerprint": clip.fingerprint, "embed_dim": clip.embed_dim}
    if text_states:
        try:
            facts["text_states"] = {"context_length": clip.context_length, "state_dim": clip.text_state_dim}
        except ValueError as error:
            raise ConfigError(f"clip = {source!r}: its text states are wanted, but {error}") from None
    return facts


def _check_text_states(config: TrainConfig, clip: Mapping[str, Any], what: str) -> None:
    """Raises `ConfigError` where a decoder reads text states in another shape than they were written in."""
    objective = config.objective
    expected = objective.stage.model.text_states if isinstance(objective, DecoderObjectiveConfig) else None
    if expected is None:
        return
    if "text_states" not in clip:
        raise ConfigError(
            f"objective.stage.model.text_states: {what} are without them: write them with jobs/embed.py and "
            "text_states=true"
        )
    for name in ("context_length", "state_dim"):
        asked, there = getattr(expected, name), clip["text_states"][name]
        if asked != there:
            raise ConfigError(
                f"objective.stage.model.text_states.{name} = {asked}: {what} have {there}; set it to {there}"
            )


def _named(clip: Mapping[str, Any]) -> str:
    return f"{clip['source']!r}, {clip['fingerprint'][:12]}…"


def mixed_statistics(
    statistics: Sequence[Mapping[str, Any] | None], weights: Sequence[float]
) -> dict[str, list[float]] | None:
    """`mean` and `std` (D,) of what a batch holds: of the mix of distributions with these weights.

    None where a source has no statistics.
    """
    known = [entry for entry in statistics if entry is not None]
    if len(known) < len(statistics):
        return None
    shares = np.array(weights, dtype=np.float64)[:, None] / sum(weights)
    means, stds = (np.array([entry[name] for entry in known], dtype=np.float64) for name in ("mean", "std"))
    mean = (shares * means).sum(axis=0)
    variance = (shares * (stds**2 + (means - mean) ** 2)).sum(axis=0)
    return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist()}


def _clip_in_stream(config: TrainConfig) -> dict[str, Any]:
    assert config.clip is not None  # TrainConfig sees to it
    clip = load_clip_named(config.clip)
    facts = clip_facts(clip, config.clip, text_states="text_states" in config.objective.embedding_columns)
    _check_text_states(config, facts, f"those of clip = {config.clip!r}")
    return {**facts, "statistics": None, "inputs": clip_inputs(clip, config.clip)}


def _fitted(config: TrainConfig, clip: dict[str, Any]) -> TrainConfig:
    objective = config.objective.with_embeddings(clip["embed_dim"], clip["statistics"])
    objective.check_clip(clip["fingerprint"])
    return config.merged(
        {"objective": objective.to_dict(), "clip": clip["source"], "clip_fingerprint": clip["fingerprint"]}
    )


def _order(config: TrainConfig, manifests: Sequence[Manifest]) -> RunOrder:
    batch = config.loop.global_batch_size
    shares = batch_shares(config.data.weights, batch)
    for field, manifest, share in zip(config.data.paths, manifests, shares, strict=True):
        if manifest.rows < share:
            raise ConfigError(
                f"loop.global_batch_size = {batch}: data folder {manifest.uri!r} has only {manifest.rows} rows"
            )
        if share < 1:
            name = field.replace("path", "weight")
            raise ConfigError(f"{name}: gives less than one sample to a batch of loop.global_batch_size = {batch}")
    # Of less data than that, a chunk would hold every row several times over.
    shuffled = min(config.data.shuffle_rows, sum(manifest.rows for manifest in manifests))
    return RunOrder(
        [[fragment.rows for fragment in manifest.fragments] for manifest in manifests],
        config.seed,
        weights=config.data.weights,
        global_batch_size=batch,
        chunk_rows=max(1, shuffled // batch) * batch,
    )
