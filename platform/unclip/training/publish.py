"""From a finished run to its stage in a bundle, and to the bundle's model card."""

from __future__ import annotations

from typing import Any

from unclip.models.clip import ClipModel
from unclip.pipelines.bundle import ClipReference, save_stage
from unclip.pipelines.card import write_card
from unclip.training import checkpoint
from unclip.training.export import full_state_dict
from unclip.training.run_folder import RunFolder, versions
from unclip.training.setup import PreparedRun, clip_reference

_TOLD = ("objective", "optimizer", "loop", "zero")
"""Parts of the configuration that say how the stage was trained, and no addresses."""


def publish(prepared: PreparedRun) -> None:
    """Writes the newest checkpoint's EMA weights as the run's stage into its bundle, and the bundle's card anew.

    Raises `CheckpointError` where the run has no checkpoint, `BundleError` where the bundle belongs to another CLIP.
    """
    config = prepared.config
    assert config.bundle is not None
    newest = checkpoint.latest(RunFolder(config.run).checkpoints_uri)
    if newest is None:
        raise checkpoint.CheckpointError(f"run {config.run!r} has no checkpoint to export")
    stage = config.objective.stage_config()
    tensors = full_state_dict(newest)
    clip = clip_reference(config)
    if config.stage == "clip":
        model = stage.build()
        assert isinstance(model, ClipModel)
        model.load_state_dict(tensors)
        clip = ClipReference(source=f"{config.bundle}/clip", fingerprint=model.fingerprint)
    provenance: dict[str, Any] = {
        "run": config.run,
        "recipe": config.recipe,
        "seed": config.seed,
        "versions": versions(),
        "attributions": prepared.attributions,
        "data": prepared.data_facts(newest.state["samples_seen"]),
        "training": {name: value for name, value in config.to_dict().items() if name in _TOLD},
        **newest.state,
    }
    save_stage(config.bundle, stage, tensors=tensors, clip=clip, provenance=provenance)
    write_card(config.bundle)
