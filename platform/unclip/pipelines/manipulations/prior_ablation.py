"""What the prior is for: pictures of a caption without it, beside those with it (unCLIP §5.1, figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from unclip.config.base import ConfigError
from unclip.pipelines.cascade import CascadeOutput, GenerationOptions
from unclip.pipelines.draw import StageProgress
from unclip.pipelines.pipeline import AS_STORED, Pipeline

Told = Literal["caption only", "text embedding", "prior"]


def prior_ablation(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    options: GenerationOptions = AS_STORED,
    progress: StageProgress | None = None,
) -> dict[Told, CascadeOutput]:
    """Pictures of B captions by what the decoder is told beside them, from the same noise.

    `caption only`: no image embedding at all; `text embedding`: z_t in the place of z_i; `prior`: the prior's z_i. Without
    a caption of its own a decoder has no first one.

    Raises `ConfigError` where the decoder is told no image embedding, or none of unit norm.
    """
    model = pipeline.decoder.config.model
    if model.embed_dim is None:
        raise ConfigError(f"the decoder is told {', '.join(model.inputs)}: without image embedding there is no prior")
    if not pipeline.decoder.config.unit_norm:
        raise ConfigError("decoder.unit_norm = False: a text embedding, of unit norm, is nothing that it takes for z_i")
    draw = pipeline.draw(seeds, options=options, progress=progress)
    z_t = pipeline.encode_text(prompts)
    told = {"text embedding": z_t, "prior": draw.prior(prompts, text_embed=z_t)}
    found: dict[Told, CascadeOutput] = {}
    if model.context_length is not None:
        found["caption only"] = draw.cascade_of(prompts=prompts)
    found["text embedding"] = draw.cascade_of(prompts=prompts, image_embed=told["text embedding"])
    found["prior"] = draw.cascade_of(prompts=prompts, image_embed=told["prior"])
    return found
