"""Networks that turn pictures into features: what metrics compare in place of pixels.

An extractor has two halves: `prepare` needs no network and runs where pictures are decoded, `extract` runs where the
network is. What both do to a picture is in `protocol`, since every metric depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from unclip.data.batches import Batch
from unclip.data.decode import Picture
from unclip.evaluation.inception import check_inception, load_inception
from unclip.models.clip import ClipModel, load_clip

CLIP, CLIP_TEXT, INCEPTION, INCEPTION_LOGITS = "clip", "clip_text", "inception", "inception_logits"
"""Columns of features."""
INCEPTION_SIZE = 299
RESIZE = "central square, Pillow bicubic with antialiasing, 8 bits a channel"


class Network(Protocol):
    """What runs where the accelerators are. Picklable before `setup`."""

    columns: tuple[str, ...]
    """What `extract` makes."""

    def setup(self, device: str) -> None:
        """Loads the network; once in each process."""
        ...

    def extract(self, inputs: Batch) -> Batch:
        """`columns` of B records: (B, D) float32, (B,) floats, or (B,) objects that are bytes or None."""
        ...


class Extractor(Network, Protocol):
    """Features of pictures by one network; the first of its `columns` is that of the pictures, and its name."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Which network it is and what it sees of a picture, as JSON values."""
        ...

    def prepare(self, pictures: Sequence[Picture], captions: Sequence[str | None]) -> Batch:
        """Inputs of the network: arrays with a row for each picture."""
        ...


class ClipExtractor:
    """CLIP's embeddings of pictures and captions, of unit norm; those of missing captions mean nothing.

    Args:
        source: what `load_clip` takes.
        clip: the same, loaded: it is looked at and not kept.
    """

    columns: tuple[str, ...] = (CLIP, CLIP_TEXT)

    def __init__(self, source: str, clip: ClipModel) -> None:
        self.source = source
        self._image_size, self._context_length, self._tokenizer = clip.image_size, clip.context_length, clip.tokenizer
        self._fingerprint = clip.fingerprint
        self._clip: ClipModel | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "fingerprint": self._fingerprint,
            "image_size": self._image_size,
            "resize": RESIZE,
            "features": "image embedding of unit norm",
        }

    def prepare(self, pictures: Sequence[Picture], captions: Sequence[str | None]) -> Batch:
        return {
            "clip_image": np.stack([central_square(picture, self._image_size) for picture in pictures]),
            "clip_tokens": self._tokenizer([caption or "" for caption in captions], self._context_length),
        }

    def setup(self, device: str) -> None:
        self._clip = load_clip(self.source, device)

    def extract(self, inputs: Batch) -> Batch:
        assert self._clip is not None, "setup() comes before extract()"
        image = self._clip.encode_image(inputs["clip_image"])
        text = self._clip.encode_text(torch.tensor(inputs["clip_tokens"]))
        return {CLIP: image.cpu().numpy(), CLIP_TEXT: text.cpu().numpy()}


class InceptionExtractor:
    """The pooled features, 2048 numbers, of FID's Inception network, and the logits of its 1008 classes.

    Args:
        weights: safetensors file or its name on the hub, see `unclip.evaluation.inception`.
    """

    columns: tuple[str, ...] = (INCEPTION, INCEPTION_LOGITS)

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self._sha256 = check_inception(weights)
        self._network: nn.Module | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "source": self.weights,
            "sha256": self._sha256,
            "image_size": INCEPTION_SIZE,
            "resize": RESIZE,
            "features": "2048 numbers after the last pooling; logits of 1008 classes, without the bias",
        }

    def prepare(self, pictures: Sequence[Picture], captions: Sequence[str | None]) -> Batch:
        return {"inception_image": np.stack([central_square(picture, INCEPTION_SIZE) for picture in pictures])}

    def setup(self, device: str) -> None:
        self._network = load_inception(self.weights, self._sha256, device)

    def extract(self, inputs: Batch) -> Batch:
        assert self._network is not None, "setup() comes before extract()"
        with torch.no_grad():
            features, logits = self._network(torch.tensor(inputs["inception_image"]))
        return {INCEPTION: features.cpu().numpy(), INCEPTION_LOGITS: logits.cpu().numpy()}


def extract_all(networks: Sequence[Network], inputs: Batch, microbatch: int) -> Batch:
    """The columns of all networks, of prepared records, `microbatch` of them at once."""
    parts = []
    for start in range(0, len(next(iter(inputs.values()))), microbatch):
        batch = {name: array[start : start + microbatch] for name, array in inputs.items()}
        made: Batch = {}
        for network in networks:
            made |= network.extract(batch)
        parts.append(made)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def central_square(picture: Picture, size: int) -> Picture:
    """(H, W, 3) -> (size, size, 3): what is sharp or soft in a picture decides metrics, so nothing is skipped or reduced first
    (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation")."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
