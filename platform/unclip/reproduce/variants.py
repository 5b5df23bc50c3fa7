"""What is compared: the networks that each seed trains, the embeddings that its priors draw, and the pictures of its decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GUIDANCE = 2.0
"""Scale of the decoder's guidance wherever a finding is not about that."""
STRONG = 4.0
"""The scale at which findings look for what guidance costs, against none (1)."""


@dataclass(frozen=True)
class Network:
    """A network that each seed trains.

    Args:
        base: field of `ReproduceConfig`.
        changes: of its objective.
    """

    base: Literal["prior", "ar_prior", "decoder"]
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Embeddings:
    """z_i that a prior draws for the held-out captions; of so many draws the one nearest z_t is kept."""

    prior: str
    draws: int = 2


@dataclass(frozen=True)
class Pictures:
    """Pictures of the held-out captions.

    Args:
        decoder: which network; it is told the caption in any case.
        told: the embeddings in the place of z_i: a name of `EMBEDDINGS`, `z_t` for CLIP's of the caption, None for none.
        guidance_scale: of the decoder.
    """

    decoder: str = "decoder"
    told: str | None = "diffusion"
    guidance_scale: float = GUIDANCE


def _drops(image: float, text: float) -> dict[str, float]:
    return {"image_drop_prob": image, "text_drop_prob": text}


NETWORKS: Mapping[str, Network] = {
    "decoder": Network("decoder", _drops(0.1, 0.5)),
    "decoder_no_drops": Network("decoder", _drops(0.0, 0.0)),
    "decoder_equal_drops": Network("decoder", _drops(0.1, 0.1)),
    "decoder_captions": Network("decoder", _drops(1.0, 0.2)),  # GLIDE: never any z_i
    "prior": Network("prior"),
    "prior_epsilon": Network("prior", {"stage": {"diffusion": {"prediction_type": "epsilon"}}}),
    "ar_prior": Network("ar_prior"),
}

EMBEDDINGS: Mapping[str, Embeddings] = {
    "diffusion": Embeddings("prior"),
    "one_draw": Embeddings("prior", draws=1),
    "autoregressive": Embeddings("ar_prior"),
    "epsilon": Embeddings("prior_epsilon"),
}
"""Measured by `cosine`: the mean cosine to the true z_i; `frechet`: the distance to those of the held-out pictures."""

PICTURES: Mapping[str, Pictures] = {
    "unclip": Pictures(),
    "unclip_unguided": Pictures(guidance_scale=1.0),
    "unclip_strong": Pictures(guidance_scale=STRONG),
    "text_embedding": Pictures(told="z_t"),
    "caption_alone": Pictures(told=None),
    "autoregressive_pictures": Pictures(told="autoregressive"),
    "one_draw_pictures": Pictures(told="one_draw"),
    "glide": Pictures("decoder_captions", told=None),
    "glide_unguided": Pictures("decoder_captions", told=None, guidance_scale=1.0),
    "glide_strong": Pictures("decoder_captions", told=None, guidance_scale=STRONG),
    "no_drops_unguided": Pictures("decoder_no_drops", guidance_scale=1.0),
    "no_drops_strong": Pictures("decoder_no_drops", guidance_scale=STRONG),
    "equal_drops_unguided": Pictures("decoder_equal_drops", guidance_scale=1.0),
    "equal_drops_strong": Pictures("decoder_equal_drops", guidance_scale=STRONG),
}
"""Measured by `frechet`: the distance to the held-out pictures, `clip_score`, and `diversity` of a caption's pictures."""
