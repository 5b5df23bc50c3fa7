"""Frozen CLIP embeddings of records, and the statistics that normaliser and principal components are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from unclip.data.batches import Batch
from unclip.data.manifest import DataError

if TYPE_CHECKING:
    from unclip.models.clip import ClipModel

MICROBATCH = 64
"""Records that pass a CLIP at once where nothing else is asked for."""
CLIP_INPUTS = ("clip_image", "clip_tokens")
"""Arrays that only a CLIP in the stream needs."""


def clip_inputs(clip: ClipModel, source: str) -> dict[str, Any]:
    """Fields of a `BatchSpec` by which batches hold the inputs of `clip`, which `source` names."""
    return {
        "clip_image_size": clip.image_size,
        "clip_tokenizer": source,
        "clip_context_length": clip.context_length,
    }


class ClipEmbedStage:
    """A batch job's stage: pictures and tokens in, their CLIP embeddings beside them out.

    Args:
        source: what `load_clip` takes: an open_clip name, `hf-hub:…`, or an exported `clip` stage.
        device: a torch device.
        microbatch: records that pass the model at once.
        text_states: whether the states of all tokens are wanted too, see `ClipModel.encode_text_states`.
    """

    def __init__(
        self, source: str, device: str = "cpu", *, microbatch: int = MICROBATCH, text_states: bool = False
    ) -> None:
        self.source = source
        self.device = device
        self.microbatch = microbatch
        self.text_states = text_states
        self._clip: ClipModel | None = None

    def setup(self) -> None:
        """Loads the model; once in each process."""
        from unclip.models.clip import load_clip  # here: what only counts or writes does without torch

        self._clip = load_clip(self.source, self.device)

    def process(self, batch: Batch) -> Batch:
        """Adds `image_embed` and `text_embed` (B, D), unit norm, and as asked for `text_states` (B, L*S), all float16.

        Needs `id` (B,), `clip_image` (B, H, H, 3) uint8 and `clip_tokens` (B, L) of the model's own tokenizer, and hands
        on all arrays but the last two. A row of `text_states` holds the S numbers of the first token, then those of the
        second, and so on. Raises `DataError` naming the first record of which a number is not finite.
        """
        images, tokens = batch["clip_image"], batch["clip_tokens"].astype(np.int64)
        starts = range(0, len(images), self.microbatch)
        parts = [
            self._embed(images[start : start + self.microbatch], tokens[start : start + self.microbatch])
            for start in starts
        ]
        added = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for name, array in added.items():
            is_finite = np.isfinite(array).all(axis=1)
            if not is_finite.all():
                raise DataError(f"record {batch['id'][is_finite.argmin()]}: {name} is not finite")
        return {name: array for name, array in batch.items() if name not in CLIP_INPUTS} | added

    def _embed(self, images: npt.NDArray[np.uint8], tokens: npt.NDArray[np.int64]) -> Batch:
        if self._clip is None:
            raise RuntimeError("setup() comes before process()")
        import torch

        device_tokens = torch.from_numpy(tokens).to(self.device)
        # A copy of the pictures: arrays out of Arrow are read-only.
        made = {"image_embed": self._clip.encode_image(torch.tensor(images).to(self.device))}
        if self.text_states:
            made["text_embed"], states = self._clip.encode_text_states(device_tokens)
            made["text_states"] = states.flatten(1)
        else:
            made["text_embed"] = self._clip.encode_text(device_tokens)
        return {name: tensor.to(torch.float16).cpu().numpy() for name, tensor in made.items()}


class EmbeddingStatistics:
    """Mean and covariance of vectors seen in any order and in any number of processes, in float64.

    `scatter` (D, D) is the sum of outer products of deviations from the mean. Merging follows Chan, Golub and LeVeque
    1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self, embed_dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(embed_dim)
        self.scatter = np.zeros((embed_dim, embed_dim))

    def update(self, vectors: npt.NDArray[Any]) -> None:
        """Takes in (B, D) vectors."""
        values = vectors.astype(np.float64)
        if len(values):
            part = EmbeddingStatistics(values.shape[1])
            part.count, part.mean = len(values), values.mean(axis=0)
            centred = values - part.mean
            part.scatter = centred.T @ centred
            self.merge(part)

    def merge(self, other: EmbeddingStatistics) -> None:
        """Takes in what another one has seen."""
        count = self.count + other.count
        if count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        self.count = count

    @property
    def covariance(self) -> npt.NDArray[np.float64]:
        """(D, D) of the population."""
        return self.scatter / max(self.count, 1)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """(D,) standard deviation of the population."""
        return np.sqrt(self.covariance.diagonal())

    def to_bytes(self) -> bytes:
        """A safetensors file, from which `from_bytes` makes exactly the same."""
        return save({"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        arrays = load(content)
        statistics = cls(len(arrays["mean"]))
        statistics.count, statistics.mean = int(arrays["count"]), arrays["mean"]
        statistics.scatter = arrays["scatter"]
        return statistics
