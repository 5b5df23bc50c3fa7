"""Weights by a name of the hub: fetched once, found again without it, and refused with a reason."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save, save_file
from tests.support.hub import running_hub

from unclip.config.base import ConfigError
from unclip.evaluation.weights import check_weights
from unclip.utils.hub import HubName, parse_hub

build = partial(torch.nn.Linear, 2, 1)
CONTENT = save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
PATH = "deep/weights.safetensors"


def test_a_file_of_the_hub_is_fetched_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    folder = tmp_path / "networks"
    (folder / "deep").mkdir(parents=True)
    (folder / PATH).write_bytes(CONTENT)
    names = [f"hf-hub:someone/networks{revision}/{PATH}" for revision in ("", "@v1")]
    absent = "hf-hub:someone/networks/other.safetensors"

    def look() -> None:
        assert [check_weights("inception", name, build, "a layer") for name in names] == [digest, digest]
        with pytest.raises(ConfigError, match=f"^inception = '{absent}': the hub does not give it: .+"):
            check_weights("inception", absent, build, "a layer")

    with running_hub(tmp_path / "cache") as hub:
        hub.publish("someone/networks", folder)
        look()
        look()
        assert hub.fetched == [PATH]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    look()


def test_names_of_the_hub_are_taken_apart() -> None:
    assert parse_hub(f"hf-hub:someone/networks@v2/{PATH}") == HubName("someone/networks", "v2", PATH)
    assert parse_hub("hf-hub:someone/networks") == HubName("someone/networks", None, None)
    assert parse_hub("s3://bucket/someone/networks") is None
    with pytest.raises(ValueError, match="expected hf-hub:ORG/NAME"):
        parse_hub("hf-hub:networks")


def test_bad_names_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"inception = 'hf-hub:networks': expected hf-hub:ORG/NAME"):
        check_weights("inception", "hf-hub:networks", build, "a layer")
    with pytest.raises(ConfigError, match=r"inception = 'hf-hub:some/networks': names no file"):
        check_weights("inception", "hf-hub:some/networks", build, "a layer")
    with pytest.raises(ConfigError, match=r"inception = .*nowhere': there is no such file"):
        check_weights("inception", str(tmp_path / "nowhere"), build, "a layer")


def test_what_is_not_the_networks_is_refused_with_the_field(tmp_path: Path) -> None:
    """The pickle that the field passes around among them."""
    torch.save({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, tmp_path / "weights.pth")
    save_file({"weight": torch.ones(1, 2)}, tmp_path / "part.safetensors")
    save_file({"weight": torch.ones(1, 3), "bias": torch.zeros(1)}, tmp_path / "wide.safetensors")
    for name in ("weights.pth", "part.safetensors", "wide.safetensors"):
        with pytest.raises(
            ConfigError, match=rf"^inception = '.*{name}': not the weights of a layer as safetensors: .+"
        ):
            check_weights("inception", str(tmp_path / name), build, "a layer")
