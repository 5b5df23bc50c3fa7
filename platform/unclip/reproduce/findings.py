"""The paper's findings (Ramesh et al. 2022, arXiv 2204.06125) as claims that a number is below another in every seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MetricName = Literal["frechet", "clip_score", "diversity", "cosine"]
Measured = Mapping[str, Mapping[str, float]]
"""Metrics of one seed by the name of the embeddings or pictures."""


@dataclass(frozen=True)
class Quantity:
    """A metric of some pictures or embeddings, less that of others where `minus` names them."""

    metric: MetricName
    of: str
    minus: str | None = None

    def value(self, measured: Measured) -> float:
        less = 0.0 if self.minus is None else measured[self.minus][self.metric]
        return measured[self.of][self.metric] - less


@dataclass(frozen=True)
class Claim:
    """One comparison: `below` is below `above`."""

    text: str
    below: Quantity
    above: Quantity


@dataclass(frozen=True)
class Finding:
    """What the paper says, and what would bear it out here."""

    name: str
    paper: str
    claims: tuple[Claim, ...]


def _of(metric: MetricName, below: str, above: str) -> tuple[Quantity, Quantity]:
    return Quantity(metric, below), Quantity(metric, above)


FINDINGS: tuple[Finding, ...] = (
    Finding(
        "a prior",
        "§5.1, figure 8: the caption alone is clearly worst; FID 16.55 with z_t in the place of z_i, 7.99 with the prior; "
        "table 2: 10.39 against 12.24 of GLIDE, a decoder of captions",
        (
            Claim("FD: prior below z_t", *_of("frechet", "unclip", "text_embedding")),
            Claim("FD: prior below caption alone", *_of("frechet", "unclip", "caption_alone")),
            Claim("FD: z_t below caption alone", *_of("frechet", "text_embedding", "caption_alone")),
            Claim("CLIP-score: prior above caption alone", *_of("clip_score", "caption_alone", "unclip")),
            Claim("FD: prior below GLIDE", *_of("frechet", "unclip", "glide")),
        ),
    ),
    Finding(
        "diffusion prior against autoregressive prior, equal training FLOPs",
        "§5.2 and 5.4: FID 10.39 against 10.63; more diverse than GLIDE in 70.5% against 62.6% of comparisons; for less compute",
        (
            Claim("FD: diffusion below autoregressive", *_of("frechet", "unclip", "autoregressive_pictures")),
            Claim("diversity: diffusion above autoregressive", *_of("diversity", "autoregressive_pictures", "unclip")),
            Claim("FD of z_i: diffusion below autoregressive", *_of("frechet", "diffusion", "autoregressive")),
            Claim("cosine to z_i: diffusion above autoregressive", *_of("cosine", "autoregressive", "diffusion")),
        ),
    ),
    Finding(
        "the prior predicts z_i, not the noise",
        "§2.2: predicting the unnoised z_i was found better",
        (
            Claim("FD of z_i: z_i predicted below noise predicted", *_of("frechet", "diffusion", "epsilon")),
            Claim("cosine to z_i: z_i predicted above noise predicted", *_of("cosine", "epsilon", "diffusion")),
        ),
    ),
    Finding(
        "guidance and diversity",
        "§5.3, figures 9 to 11: guided harder, GLIDE's pictures of a caption become alike and its FID rises; unCLIP's far less, "
        "as z_i is fixed before",
        (
            Claim("diversity: unCLIP above GLIDE", *_of("diversity", "glide", "unclip")),
            Claim("CLIP-score: unCLIP rises with guidance", *_of("clip_score", "unclip_unguided", "unclip_strong")),
            Claim(
                "diversity lost from scale 1 to 4: unCLIP below GLIDE",
                Quantity("diversity", "unclip_unguided", minus="unclip_strong"),
                Quantity("diversity", "glide_unguided", minus="glide_strong"),
            ),
            Claim(
                "FD gained from scale 1 to 4: unCLIP below GLIDE",
                Quantity("frechet", "unclip_strong", minus="unclip_unguided"),
                Quantity("frechet", "glide_strong", minus="glide_unguided"),
            ),
        ),
    ),
    Finding(
        "two draws of the prior, the one nearer z_t kept",
        "§2.2: improves quality",
        (
            Claim("cosine to z_i: two draws above one", *_of("cosine", "one_draw", "diffusion")),
            Claim("CLIP-score: two draws above one", *_of("clip_score", "one_draw_pictures", "unclip")),
            Claim("FD: two draws below one", *_of("frechet", "unclip", "one_draw_pictures")),
        ),
    ),
    Finding(
        "drop rates",
        "§2.1: z_i dropped 10% and the caption 50% of the time, for guidance; other rates are not reported",
        (
            Claim(
                "CLIP-score gained from scale 1 to 4: 10%/50% above none",
                Quantity("clip_score", "no_drops_strong", minus="no_drops_unguided"),
                Quantity("clip_score", "unclip_strong", minus="unclip_unguided"),
            ),
            Claim(
                "FD gained from scale 1 to 4: 10%/50% below none",
                Quantity("frechet", "unclip_strong", minus="unclip_unguided"),
                Quantity("frechet", "no_drops_strong", minus="no_drops_unguided"),
            ),
            Claim(
                "CLIP-score gained from scale 1 to 4: 10%/50% above 10%/10%",
                Quantity("clip_score", "equal_drops_strong", minus="equal_drops_unguided"),
                Quantity("clip_score", "unclip_strong", minus="unclip_unguided"),
            ),
            Claim(
                "FD gained from scale 1 to 4: 10%/50% below 10%/10%",
                Quantity("frechet", "unclip_strong", minus="unclip_unguided"),
                Quantity("frechet", "equal_drops_strong", minus="equal_drops_unguided"),
            ),
        ),
    ),
)
