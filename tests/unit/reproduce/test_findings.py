"""The declared findings: every name exists, every metric is one that its kind of thing has, and numbers give the verdict."""

from __future__ import annotations

from collections import defaultdict

import pytest

from unclip.reproduce.findings import FINDINGS, Claim
from unclip.reproduce.result import lines, summarise
from unclip.reproduce.variants import EMBEDDINGS, NETWORKS, PICTURES

CLAIMS = [claim for finding in FINDINGS for claim in finding.claims]
METRICS = {name: {"cosine", "frechet", "diversity"} for name in EMBEDDINGS} | {
    name: {"clip_score", "frechet", "diversity"} for name in PICTURES
}


def names_of(claim: Claim) -> set[str]:
    return {name for side in (claim.below, claim.above) for name in (side.of, side.minus) if name is not None}


def test_names_are_of_one_thing_each() -> None:
    assert not EMBEDDINGS.keys() & PICTURES.keys()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_claims_are_about_what_is_measured(claim: Claim) -> None:
    assert claim.below.metric == claim.above.metric
    assert all(claim.below.metric in METRICS[name] for name in names_of(claim))


def test_nothing_is_trained_or_drawn_for_nobody() -> None:
    used = set().union(*map(names_of, CLAIMS))
    pictures = {name for name in PICTURES if name in used}
    embeddings = used & EMBEDDINGS.keys() | {PICTURES[name].told for name in pictures} & EMBEDDINGS.keys()
    networks = {EMBEDDINGS[name].prior for name in embeddings} | {PICTURES[name].decoder for name in pictures}
    assert pictures == PICTURES.keys()
    assert embeddings == EMBEDDINGS.keys()
    assert networks == NETWORKS.keys()


def test_verdicts_follow_from_the_numbers_of_each_seed() -> None:
    """Of three seeds: prior's distance always below that of z_t, always above that of the caption alone."""
    measured = [
        defaultdict(lambda: dict.fromkeys(("frechet", "clip_score", "diversity", "cosine"), 0.5)) for _ in "abc"
    ]
    for seed, of in enumerate(measured):
        of["unclip"] = {"frechet": 0.2 + seed / 10, "clip_score": 0.9, "diversity": 0.5}
        of["text_embedding"] = {"frechet": 0.5 + seed / 10, "clip_score": 0.5, "diversity": 0.5}
        of["caption_alone"] = {"frechet": 0.1 + seed / 10, "clip_score": 0.1 + seed, "diversity": 0.5}
    result = summarise(measured)
    claims = {claim["claim"]: claim for claim in result["findings"][0]["claims"]}
    below_text = claims["FD: prior below z_t"]
    assert below_text["below"] == pytest.approx([0.2, 0.3, 0.4])
    assert below_text["above"] == pytest.approx([0.5, 0.6, 0.7])
    assert below_text["difference"]["mean"] == pytest.approx(0.3)
    assert below_text["verdict"] == "held"
    assert claims["FD: prior below caption alone"]["verdict"] == "did not hold"
    assert claims["CLIP-score: prior above caption alone"]["verdict"] == "not decided"
    assert any(line.split()[:2] == ["held", "FD:"] for line in lines(result))


def test_a_quantity_may_be_a_change() -> None:
    claim = next(claim for claim in CLAIMS if claim.text.startswith("diversity lost"))
    measured = {
        name: {"diversity": value}
        for name, value in {
            "unclip_unguided": 0.5,
            "unclip_strong": 0.4,
            "glide_unguided": 0.6,
            "glide_strong": 0.2,
        }.items()
    }
    assert claim.below.value(measured) == pytest.approx(0.1)
    assert claim.above.value(measured) == pytest.approx(0.4)
