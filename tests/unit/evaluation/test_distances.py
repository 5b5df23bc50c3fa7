"""Distances by networks: LPIPS by its formula with random weights, CLIP's by its embeddings; other weights are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torchvision.models import alexnet

from unclip.config.base import ConfigError
from unclip.evaluation.distances import ClipDistance, Lpips, LpipsDistance
from unclip.models.clip import ClipModel


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("lpips") / "alex.safetensors")
    save_file({name: value.contiguous() for name, value in Lpips().state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    real = torch.randint(0, 236, (2, 40, 40, 3), generator=generator)
    return (real + torch.randint(0, 20, real.shape, generator=generator)).to(torch.uint8), real.to(torch.uint8)


def test_lpips_is_the_weighted_distance_of_unit_features(
    lpips_weights: str, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    distance = LpipsDistance(lpips_weights)
    distance.setup("cpu")
    found = distance.between(*pair)
    state = load_file(lpips_weights)
    network = alexnet(weights=None).features[:12].eval().requires_grad_(False)
    for name, value in state.items():
        if name.startswith("net."):
            _, _, place, kind = name.split(".")
            getattr(network[int(place)], kind).data.copy_(value)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for row in range(2):
        layers = []
        for picture in pair:
            # ImageNet's statistics of pictures in [0, 1].
            x = ((picture[row].float() / 255 - mean) / deviation).permute(2, 0, 1)[None]
            outputs = []
            for place, layer in enumerate(network):
                x = layer(x)
                if place in (1, 4, 7, 9, 11):
                    outputs.append(functional.normalize(x[0].clone(), dim=0))
            layers.append(outputs)
        expected = sum(
            (state[f"lin{number}.model.1.weight"][0] * (a - b) ** 2).sum(dim=0).mean()
            for number, (a, b) in enumerate(zip(*layers, strict=True))
        )
        assert found[row].item() == pytest.approx(expected.item(), rel=1e-4)
    assert distance.between(pair[1], pair[1]).tolist() == [0, 0]


def test_clips_distance_is_that_of_its_embeddings(
    clip: ClipModel, clip_source: str, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    distance = ClipDistance(clip_source, clip)
    distance.setup("cpu")
    cosines = functional.cosine_similarity(*(clip.encode_image(pictures) for pictures in pair))
    assert distance.between(*pair).tolist() == pytest.approx((1 - cosines).tolist(), abs=1e-6)
    assert distance.protocol["fingerprint"] == clip.fingerprint


def test_other_weights_are_refused(lpips_weights: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lpips = .*nowhere': there is no such file"):
        LpipsDistance(str(tmp_path / "nowhere"))
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="not the weights of LPIPS with AlexNet"):
        LpipsDistance(str(tmp_path / "other.safetensors"))
    (tmp_path / "mine.safetensors").write_bytes(Path(lpips_weights).read_bytes())
    distance = LpipsDistance(str(tmp_path / "mine.safetensors"))
    save_file({"weight": torch.zeros(2)}, tmp_path / "mine.safetensors")
    with pytest.raises(ConfigError, match="another file here than where this job began"):
        distance.setup("cpu")
