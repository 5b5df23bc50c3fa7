"""Loads the UnCLIP folder that this file lies in, where `DiffusionPipeline.from_pretrained` does not.

diffusers has moved `UnCLIPTextProjModel` to where its own loader does not find it (seen in 0.42). So the parts are loaded one
by one here, and handed to the pipeline. Needs diffusers and transformers, nothing else:

>>> from load_pipeline import load
>>> load()("a red square", prior_guidance_scale=4.0).images[0]
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

_TRANSFORMERS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "feature_extractor": "CLIPImageProcessor",
}
_DIFFUSERS = {
    "prior": "PriorTransformer",
    "decoder": "UNet2DConditionModel",
    "super_res_first": "UNet2DModel",
    "super_res_last": "UNet2DModel",
}
_TEXT_PROJ = (
    "diffusers.pipelines.deprecated.unclip.text_proj",  # since 0.38
    "diffusers.pipelines.unclip.text_proj",
)


def load(folder: str | Path = Path(__file__).parent, *, variation: bool = False) -> Any:
    """The pipeline of `folder`, on the CPU in float32.

    Args:
        variation: whether it shall make variations of pictures, which needs no prior, in place of pictures of captions.
    """
    import diffusers

    folder = Path(folder)
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = diffusers.UnCLIPImageVariationPipeline if variation else getattr(diffusers, name)
    parts = [part for part in inspect.signature(pipeline.__init__).parameters if part != "self"]
    return pipeline(**{part: _loaded(folder / part) for part in parts})


def _loaded(path: Path) -> Any:
    import diffusers
    import transformers

    if path.name.endswith("scheduler"):
        return diffusers.UnCLIPScheduler.from_pretrained(path)
    if path.name == "text_proj":
        return _text_proj_class().from_pretrained(path, low_cpu_mem_usage=False)
    if path.name in _TRANSFORMERS:
        return getattr(transformers, _TRANSFORMERS[path.name]).from_pretrained(path)
    # The other way to load needs a further library, and saves memory for a moment only.
    return getattr(diffusers, _DIFFUSERS[path.name]).from_pretrained(path, low_cpu_mem_usage=False)


def _text_proj_class() -> Any:
    for name in _TEXT_PROJ:
        try:
            return importlib.import_module(name).UnCLIPTextProjModel
        except ModuleNotFoundError:
            continue
    raise ImportError(f"diffusers has UnCLIPTextProjModel in none of {', '.join(_TEXT_PROJ)}")
