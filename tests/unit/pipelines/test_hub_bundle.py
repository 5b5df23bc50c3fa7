"""Bundles by their names on a hub, which is a server on loopback here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tests.support.hub import Hub, running_hub

from unclip.pipelines.bundle import Bundle, BundleError, check_clip
from unclip.pipelines.pipeline import Pipeline
from unclip.utils import storage

COMMIT, LATER = "a" * 40, "b" * 40
NAME = "hf-hub:someone/emoji"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def folder(tiny_bundle: str, tmp_path: Path, hub: Hub) -> Path:
    """A published copy, with files beside it that a bundle does not have."""
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (copy / "README.md").write_text("a card")
    (copy / "decoder" / "pytorch_model.bin").write_bytes(b"a pickle")
    hub.publish("someone/emoji", copy, COMMIT)
    return copy


@pytest.mark.parametrize("name", [NAME, f"{NAME}@v1", f"{NAME}@{COMMIT}"])
def test_is_the_bundle_that_was_published(folder: Path, hub: Hub, name: str) -> None:
    bundle, published = Bundle.load(name), Bundle.load(str(folder))
    assert bundle.uri == f"{NAME}@{COMMIT}"
    assert bundle.digest == published.digest
    assert bundle.configs == published.configs
    loaded, expected = bundle.load_model("prior").state_dict(), published.load_model("prior").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert bundle.load_clip().fingerprint == published.load_clip().fingerprint


def test_nothing_else_is_fetched(folder: Path, hub: Hub) -> None:
    bundle = Bundle.load(NAME)
    assert {path.rsplit("/", 1)[-1] for path in hub.fetched} == {"config.json", "manifest.json"}
    hub.fetched.clear()
    bundle.load_model("decoder")
    assert hub.fetched == ["decoder/model.safetensors"]
    Bundle.load(NAME).load_model("decoder")
    assert hub.fetched == ["decoder/model.safetensors"]  # what is there is not fetched again


def test_draws(folder: Path) -> None:
    pictures = Pipeline.from_bundle(NAME)(["a red circle"], seeds=[3]).images
    expected = Pipeline.from_bundle(str(folder))(["a red circle"], seeds=[3]).images
    assert pictures.keys() == expected.keys()
    assert all((pictures[size] == expected[size]).all() for size in expected)


def test_stays_at_its_commit(folder: Path, hub: Hub, tmp_path: Path) -> None:
    bundle = Bundle.load(NAME)
    smaller = Path(shutil.copytree(folder, tmp_path / "later"))
    shutil.rmtree(smaller / "prior")
    hub.repositories["someone/emoji"] = smaller
    hub.commits |= {"main": LATER, LATER: LATER}
    assert "prior" in bundle.configs
    assert "prior" not in Bundle.load(NAME).configs
    hub.repositories["someone/emoji"] = folder
    bundle.load_model("prior")


def test_works_without_the_hub_once_fetched(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    Bundle.load(NAME).load_model("decoder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    bundle = Bundle.load(NAME)
    assert bundle.uri == f"{NAME}@{COMMIT}"
    bundle.load_model("decoder")
    with pytest.raises(BundleError, match=NAME):
        bundle.load_model("prior")


def test_damaged_weights_are_refused(folder: Path) -> None:
    weights = folder / "prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match="damaged"):
        Bundle.load(NAME).load_model("prior")


def test_weights_larger_than_their_manifest_says_are_not_fetched(folder: Path, hub: Hub) -> None:
    weights = folder / "prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    bundle = Bundle.load(NAME)
    with pytest.raises(BundleError, match="but at most"):
        bundle.load_model("prior")
    assert "prior/model.safetensors" not in hub.fetched


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:someone/else", "someone/else is no repository"),
        (f"{NAME}@v9", "has no revision 'v9'"),
        (f"{NAME}/decoder", "a bundle is a whole repository, not 'decoder'"),
        ("hf-hub:someone", "expected hf-hub:ORG/NAME"),
    ],
)
def test_bad_names_are_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.load(name)


def test_a_repository_without_a_bundle_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.bin").write_bytes(b"x")
    hub.publish("someone/other", tmp_path / "other")
    with pytest.raises(BundleError, match=r"has no clip/config\.json"):
        Bundle.load("hf-hub:someone/other")


def test_nothing_is_written_to_a_hub(folder: Path) -> None:
    assert storage.absolute(NAME) == NAME
    with pytest.raises(OSError, match="no folder"):
        storage.check_writable(NAME)
    with pytest.raises(OSError, match="no folder"):
        storage.read_bytes(storage.join(NAME, "README.md"))
    check_clip(NAME, "prior", None)  # as of any folder that is not there: it has no stages
