"""Distances between a picture and the one that it should be, by what networks see in them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torchvision.models import alexnet

from unclip.evaluation.weights import check_weights, load_weights
from unclip.models.clip import ClipModel, load_clip

_ENDS = (1, 4, 7, 9, 11)
"""AlexNet's layers, the ReLU behind each convolution, whose outputs are compared."""
_CHANNELS = (64, 192, 384, 256, 256)
_LPIPS = "LPIPS with AlexNet"
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation, for pictures in [-1, 1], with the digits of LPIPS."""


class Distance(Protocol):
    """Picklable before `setup`."""

    name: str

    @property
    def protocol(self) -> dict[str, Any]:
        """Which network it is, as JSON values."""
        ...

    def setup(self, device: str) -> None:
        """Loads the network."""
        ...

    def between(self, pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """(B,) of uint8 (B, H, W, 3)."""
        ...


class ClipDistance:
    """1 minus the cosine of CLIP's embeddings: how much of what a picture shows was changed, not how sharp it is.

    Args:
        source: what `load_clip` takes.
        clip: the same, loaded: it is looked at and not kept.
    """

    name = "clip_distance"

    def __init__(self, source: str, clip: ClipModel) -> None:
        self.source, self._fingerprint = source, clip.fingerprint
        self._clip: ClipModel | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        return {"source": self.source, "fingerprint": self._fingerprint}

    def setup(self, device: str) -> None:
        self._clip = load_clip(self.source, device)

    def between(self, pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        assert self._clip is not None, "setup() comes first"
        return 1 - (self._clip.encode_image(pictures) * self._clip.encode_image(real)).sum(dim=1)


class LpipsDistance:
    """LPIPS v0.1 on AlexNet (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric").

    Args:
        weights: safetensors file or its name on the hub, with the names of the `lpips` package's state dictionary.
    """

    name = "lpips"

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self._sha256 = check_weights(self.name, weights, Lpips, _LPIPS)
        self._network: Lpips | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        return {"source": self.weights, "sha256": self._sha256}

    def setup(self, device: str) -> None:
        network = Lpips()
        load_weights(self.name, self.weights, self._sha256, network, _LPIPS)
        self._network = network.to(device).eval().requires_grad_(False)

    def between(self, pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        assert self._network is not None, "setup() comes first"
        return self._network(pictures, real)


class Lpips(nn.Module):
    """uint8 (B, H, W, 3) twice, sides at least 31 -> (B,): equation 1 of the paper.

    The state has the names of the `lpips` package: `net.sliceN.K.weight` of AlexNet's convolutions, `linN.model.1.weight`.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = alexnet(weights=None).features
        self.net = nn.ModuleDict()
        start = 0
        for number, end in enumerate(_ENDS, 1):
            slice_ = nn.Sequential()
            for place in range(start, end + 1):
                slice_.add_module(str(place), layers[place])
            self.net[f"slice{number}"], start = slice_, end + 1
        for number, channels in enumerate(_CHANNELS):
            self.add_module(f"lin{number}", _Weights(channels))

    def forward(self, pictures: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        x, y = self._scaled(pictures), self._scaled(real)
        distance = x.new_zeros(len(x))
        for number, slice_ in enumerate(self.net.values()):
            x, y = slice_(x), slice_(y)
            weighted = self.get_submodule(f"lin{number}")((_unit(x) - _unit(y)).square())
            distance = distance + weighted.mean(dim=(1, 2, 3))
        return distance

    def _scaled(self, pictures: torch.Tensor) -> torch.Tensor:
        weight = next(self.parameters())
        shift, scale = (weight.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        return (pictures.to(weight).movedim(3, 1) / 127.5 - 1 - shift) / scale


class _Weights(nn.Module):
    """One weight a channel; the first of the two modules is a dropout in training, of which nothing is left here."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) with the channels of each place scaled to a vector of length 1."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
