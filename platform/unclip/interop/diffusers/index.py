"""`model_index.json`: which parts a pipeline has, and of which class each is."""

from __future__ import annotations

from typing import Any

TEXT_TO_IMAGE, VARIATION = "UnCLIPPipeline", "UnCLIPImageVariationPipeline"
EXTRAS = "unclip.json"
"""The file of what our stages have and diffusers has no place for; others do not read it."""

_PARTS = {
    "prior": ["diffusers", "PriorTransformer"],
    "decoder": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_proj": ["unclip", "UnCLIPTextProjModel"],  # the name that releases before 0.38 look for
    "super_res_first": ["diffusers", "UNet2DModel"],
    "super_res_last": ["diffusers", "UNet2DModel"],
    "prior_scheduler": ["diffusers", "UnCLIPScheduler"],
    "decoder_scheduler": ["diffusers", "UnCLIPScheduler"],
    "super_res_scheduler": ["diffusers", "UnCLIPScheduler"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
_NOT_IN = {TEXT_TO_IMAGE: {"image_encoder", "feature_extractor"}, VARIATION: {"prior", "prior_scheduler"}}


def model_index(pipeline: str) -> dict[str, Any]:
    """The index of either pipeline, as the last diffusers wrote it that supported them in full, 0.33.1."""
    parts = {name: entry for name, entry in _PARTS.items() if name not in _NOT_IN[pipeline]}
    return {"_class_name": pipeline, "_diffusers_version": "0.33.1", **parts}
