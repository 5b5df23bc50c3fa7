"""A folder of transformers' `CLIPModel` as the stage `clip`, which `load_clip` and so every job's `clip` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from unclip.interop import hf_clip
from unclip.interop.base import ImportedStage, Source, shapes_of
from unclip.interop.folder import read_config, read_object, read_tensors
from unclip.interop.keys import Account, InteropError, prefixed, reshaped, to_ours
from unclip.interop.settings import Settings
from unclip.models.clip import ClipArchitectureConfig
from unclip.pipelines.bundle import ClipReference
from unclip.pipelines.stages import ClipStageConfig
from unclip.utils.hashing import fingerprint

PICTURE_STEPS = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
"""What a `CLIPImageProcessor` does to a picture, which are its defaults."""
_TOWERS = ("text_config", "vision_config")
_TEXT = {  # what transformers leaves out of `text_config` where it is its own default
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
}
_POSITIONS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def import_hf_clip(source: Source) -> Iterator[ImportedStage]:
    """The `clip` stage of a folder with `config.json`, weights and `preprocessor_config.json`."""
    folder = Path(source.path)
    settings = read_object(folder / "config.json")
    if settings.get("model_type") != "clip" or not all(isinstance(settings.get(name), dict) for name in _TOWERS):
        raise InteropError(
            f"{folder}: model_type = {settings.get('model_type')!r}: must be clip, with both towers' configs"
        )
    text = hf_clip.text_config(_TEXT | settings["text_config"], hf_clip.embed_dim(settings), part="text_config")
    shape = hf_clip.architecture(text, _VISION | settings["vision_config"], part="vision_config")
    check_pictures(read_config(folder, "feature_extractor", inside=False), shape)
    theirs = read_tensors(folder)
    config = ClipStageConfig(architecture=shape)
    entries = [
        *hf_clip.text_entries(text),
        *hf_clip.vision_entries(shape),
        *reshaped("logit_scale", "logit_scale", (1,), ()),
    ]
    dropped = {name: "counts from 0" for name in _POSITIONS if name in theirs}
    tensors, account = to_ours("CLIPModel", prefixed(entries, ours="clip."), theirs, shapes_of(config), dropped=dropped)
    yield clip_stage(config, tensors, account, str(folder))


def clip_stage(
    config: ClipStageConfig, tensors: Mapping[str, torch.Tensor], account: Account, source: str
) -> ImportedStage:
    """The stage with what it is known by: the fingerprint of its weights."""
    with torch.device("meta"):
        description = config.build().description.to_json()
    state = {name.removeprefix("clip."): tensor for name, tensor in tensors.items()}
    return ImportedStage(
        config, tensors, ClipReference(source=source, fingerprint=fingerprint(state, description)), (account,)
    )


def check_pictures(settings: Mapping[str, Any], architecture: ClipArchitectureConfig) -> None:
    """Raises `InteropError` unless a `CLIPImageProcessor` brings pictures to CLIP as they are brought here."""
    with torch.device("meta"):
        description = architecture.build().description
    expected = {"image_mean": list(description.mean), "image_std": list(description.std), "resample": 3}
    for name, value in expected.items():
        if settings.get(name) != value:
            raise InteropError(f"feature_extractor: {name} = {settings.get(name)!r}: CLIP's, and ours, is {value!r}")
    side = architecture.image_size
    for name, size, kept in (
        ("size", settings.get("size"), {"shortest_edge": side}),
        ("crop_size", settings.get("crop_size", side), {"height": side, "width": side}),
    ):
        if size not in (side, kept):
            raise InteropError(
                f"feature_extractor: {name} = {size!r}: the image encoder takes pictures of {side} pixels"
            )
    Settings("feature_extractor", settings).must(**PICTURE_STEPS)
