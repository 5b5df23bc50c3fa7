"""The card of a bundle: what it says is what the bundle's files say, and nothing in it is taken for Markdown or YAML."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from unclip.config.base import ConfigError
from unclip.pipelines.bundle import Bundle, BundleError, ClipReference, save_stage
from unclip.pipelines.card import CardFacts, write_card
from unclip.pipelines.stages import StageConfig

SOURCE = {"name": "OpenMoji 16.0", "licence": "CC-BY-SA-4.0", "rows": 3654, "samples": 12800, "identity": "0" * 64}
PROVENANCE = {
    "run": "s3://company/secret/run",
    "recipe": "demo",
    "step": 100,
    "samples_seen": 12800,
    "attributions": ["Emojis by OpenMoji, <b>CC</b> | BY-SA"],
    "data": [SOURCE],
    "training": {"optimizer": {"learning_rate": 0.001}},
}
RESULT = {
    "pictures": 128,
    "metrics": {"clip": {"frechet_distance": 12.345678, "cmmd": None}, "clip_score": {"mean": 0.25}},
    "protocol": {"pictures": {"made_by": {"bundle": "f" * 64}}},
}


@pytest.fixture
def bundle(tiny_bundle: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def add_upsampler(
    bundle: Path, configs: Mapping[str, StageConfig], models: Mapping[str, nn.Module], **changes: Any
) -> None:
    config = configs["upsampler_256"]
    tensors = models["upsampler_256"].state_dict()
    save_stage(str(bundle), config, tensors=tensors, clip=None, provenance={**PROVENANCE, **changes})


def card_of(bundle: Path, facts: CardFacts | None = None) -> str:
    return Path(write_card(str(bundle), facts)).read_text(encoding="utf-8")


def test_hub_reads_its_front_matter(bundle: Path) -> None:
    card = ModelCard(card_of(bundle, CardFacts(licence="cc-by-sa-4.0")))
    assert card.data.library_name == "unclip"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.license == "cc-by-sa-4.0"
    assert "Licence of the weights: cc-by-sa-4.0." in card.text


def test_says_what_its_files_say(
    bundle: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    add_upsampler(bundle, tiny_configs, tiny_models)
    card = card_of(bundle)
    millions = sum(parameter.numel() for parameter in tiny_models["upsampler_256"].parameters()) / 1e6
    row = next(line for line in card.splitlines() if line.startswith("| upsampler_256 | to"))
    assert [cell.strip() for cell in row.split("|")[3:8]] == [
        f"{millions:,.2f}M",
        "demo",
        "100",
        "12,800",
        "trained here",
    ]
    assert r"| upsampler_256 | OpenMoji 16.0 | 3,654 | 12,800 | CC\-BY\-SA\-4.0 |" in card
    assert Bundle.load(str(bundle)).clip.fingerprint[:16] in card  # type: ignore[union-attr]
    blocks = [json.loads(text) for text in re.findall(r"```json\n(.*?)\n```", card, flags=re.DOTALL)]
    assert tiny_configs["upsampler_256"].to_dict()["sampling"] in [block.get("sampling") for block in blocks]
    assert PROVENANCE["training"] in blocks
    assert "company" not in card  # addresses of runs and records are nobody's business


def test_a_clip_is_named_but_its_address_is_not(
    tmp_path: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    for source, said in (("ViT-B-32/openai", r"ViT\-B\-32/openai"), ("s3://company/clip", "not in this folder")):
        clip = ClipReference(source=source, fingerprint="e" * 64)
        tensors = tiny_models["prior"].state_dict()
        save_stage(str(tmp_path), tiny_configs["prior"], tensors=tensors, clip=clip, provenance={})
        card = card_of(tmp_path)
        assert said in card
        assert "e" * 64 in card
        assert "company" not in card


def test_text_from_elsewhere_stays_text(
    bundle: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    add_upsampler(
        bundle, tiny_configs, tiny_models, recipe="x | y\n# heading", data=[{"name": "```\n<script>", "rows": 1}]
    )
    card = card_of(bundle)
    assert r"| x \| y \# heading |" in card
    assert r"\<b\>CC\</b\> \| BY\-SA" in card
    assert "<script>" not in card
    assert "\n# heading" not in card


def test_does_not_change_the_bundle(bundle: Path) -> None:
    before = Bundle.load(str(bundle))
    first = card_of(bundle)
    after = Bundle.load(str(bundle))
    assert after.digest == before.digest
    assert after.manifests == before.manifests
    assert card_of(bundle) == first  # the same files make the same card


def test_grows_with_the_bundle(
    bundle: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    shutil.rmtree(bundle / "upsampler_256")
    assert "upsampler_256" not in card_of(bundle)
    add_upsampler(bundle, tiny_configs, tiny_models)
    assert "| upsampler_256 |" in card_of(bundle)


def test_evaluation_is_kept_until_there_is_another(bundle: Path) -> None:
    digest = Bundle.load(str(bundle)).digest
    own = {**RESULT, "protocol": {"pictures": {"made_by": {"bundle": digest}}}}
    card = card_of(bundle, CardFacts(evaluation=own))
    assert r"| clip.frechet\_distance | 12.3457 |" in card
    assert r"| clip\_score.mean | 0.25 |" in card
    assert "cmmd" not in card
    assert "earlier state" not in card
    assert "12.3457" in card_of(bundle)
    other = card_of(bundle, CardFacts(evaluation=RESULT))
    assert "**Of an earlier state of this bundle**" in other
    assert Bundle.load(str(bundle)).digest == digest


def test_lists_are_shortened(
    bundle: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    add_upsampler(bundle, tiny_configs, tiny_models, training={"losses": list(range(5000))})
    card = card_of(bundle)
    assert '"… 5000 in all"' in card
    assert len(card) < 30_000


def test_bad_facts_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="licence"):
        CardFacts.from_dict({"licence": "x\nevil: true"})
    (bundle / "card.json").write_text('{"license": "mit"}')
    with pytest.raises(BundleError, match=r"card\.json"):
        write_card(str(bundle))
    with pytest.raises(BundleError, match="is no bundle"):
        write_card(str(tmp_path / "nothing"))


def test_dry_run_writes_nothing(bundle: Path) -> None:
    write_card(str(bundle), CardFacts(licence="mit"), dry_run=True)
    assert not (bundle / "README.md").exists()
    assert not (bundle / "card.json").exists()


def test_works_on_an_object_store(
    tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    uri = "memory://bundles/with-card"
    tensors: dict[str, torch.Tensor] = dict(tiny_models["upsampler_256"].state_dict())
    save_stage(uri, tiny_configs["upsampler_256"], tensors=tensors, clip=None, provenance={})
    assert write_card(uri) == f"{uri}/README.md"
