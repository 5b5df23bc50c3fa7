"""What a server knows of its bundle without weights."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from tests.support.engines import unit
from tests.support.revisions import save_with_other_weights

from unclip.config.base import ConfigError
from unclip.generation.engine.request import Request
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import GenerationOptions
from unclip.serving.stages.model import Model, Models, image_size_of

ALL = GenerationOptions()


def test_facts_of_a_bundle(tiny_bundle: str) -> None:
    model = Model.load(tiny_bundle, ALL)
    assert (model.sizes, model.embed_dim, model.clip_image_size) == ((16, 32, 64), 8, 16)
    assert (model.classes, model.attribution, model.digest) == ((), "", Bundle.load(tiny_bundle).digest)
    assert abs(model.loaded_at - time.time()) < 60
    assert Model.load(tiny_bundle, ALL.merged({"up_to": 32})).sizes == (16, 32)


def test_weights_are_not_read(tiny_bundle: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    for path in (tmp_path / "bundle").glob("*/model.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert Model.load(str(tmp_path / "bundle"), ALL).sizes == (16, 32, 64)


def test_a_bundle_without_a_prior_draws_what_embeddings_say(tiny_bundle: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle" / "prior")
    model = Model.load(str(tmp_path / "bundle"), ALL)
    assert list(model.plan(Request(image_embed=unit(0))).sampling) == ["decoder", "upsampler_256", "upsampler_1024"]
    with pytest.raises(BundleError, match="prior"):
        model.plan(Request(prompt="two dogs"))
    shutil.rmtree(tmp_path / "bundle" / "decoder")
    with pytest.raises(BundleError, match="decoder"):
        Model.load(str(tmp_path / "bundle"), ALL)


def test_options_that_do_not_suit_the_bundle_are_refused(tiny_bundle: str) -> None:
    with pytest.raises(ConfigError, match="up_to = 128"):
        Model.load(tiny_bundle, ALL.merged({"up_to": 128}))
    with pytest.raises(ConfigError, match="up_to = 128"):
        Model.load(tiny_bundle, ALL).plan(Request(prompt="two dogs", options=ALL.merged({"up_to": 128})))


@pytest.mark.parametrize(
    ("source", "size"), [("ViT-L-14-336/openai", 336), ("ViT-B-32", 224), ("xlm-roberta-base-ViT-B-32/x", 224)]
)
def test_a_clip_of_open_clip_is_known_by_its_name(source: str, size: int) -> None:
    assert image_size_of(source) == size


def test_a_clip_elsewhere_is_known_by_its_configuration(tiny_bundle: str, tmp_path: Path) -> None:
    assert image_size_of(f"{tiny_bundle}/clip") == 16
    (tmp_path / "config.json").write_text(json.dumps({"source": "ViT-L-14-336", "architecture": None}))
    assert image_size_of(str(tmp_path)) == 336
    with pytest.raises(BundleError, match="no-such-clip"):
        image_size_of("no-such-clip")


def test_the_model_before_is_known_after_a_change(tiny_bundle: str, tmp_path: Path) -> None:
    first, other = (
        Model.load(uri, ALL) for uri in (tiny_bundle, save_with_other_weights(tiny_bundle, tmp_path / "other"))
    )
    assert first.digest != other.digest
    models = Models(first)
    assert (models.current, models.previous) == (first, None)
    models.use(other)
    assert (models.current, models.previous) == (other, first)
    again = Model.load(other.bundle.uri, ALL)
    models.use(again)
    assert models.current is again
    assert models.previous is first
