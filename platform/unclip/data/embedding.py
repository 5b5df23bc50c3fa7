"""Frozen CLIP embeddings of records, and the statistics that the embedding normaliser is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from unclip.data.batches import Batch

if TYPE_CHECKING:
    import torch

    from unclip.models.clip import ClipModel

CLIP_INPUTS = ("clip_image", "clip_tokens")
"""Arrays that only a CLIP in the stream needs."""


class ClipEmbedStage:
    """A batch job's stage: pictures and tokens in, their CLIP embeddings beside them out.

    Args:
        source: what `load_clip` takes: an open_clip name, `hf-hub:…`, or an exported `clip` stage.
        device: a torch device.
        microbatch: records that pass the model at once.
    """

    def __init__(self, source: str, device: str = "cpu", microbatch: int = 64) -> None:
        self.source = source
        self.device = device
        self.microbatch = microbatch
        self._clip: ClipModel | None = None

    def setup(self) -> None:
        """Loads the model; once in each process."""
        from unclip.models.clip import load_clip  # here: what only counts or writes does without torch

        self._clip = load_clip(self.source, self.device)

    def process(self, batch: Batch) -> Batch:
        """Adds `image_embed` and `text_embed` (B, D) float16, unit norm, to a batch.

        Needs `clip_image` (B, S, S, 3) uint8 and `clip_tokens` (B, L) of the model's own tokenizer, and hands on all
        other arrays but these two.
        """
        if self._clip is None:
            raise RuntimeError("setup() comes before process()")
        import torch

        embeds: dict[str, list[torch.Tensor]] = {"image_embed": [], "text_embed": []}
        for start in range(0, len(batch["clip_image"]), self.microbatch):
            part = slice(start, start + self.microbatch)
            pixels = torch.from_numpy(batch["clip_image"][part]).to(self.device)
            tokens = torch.from_numpy(batch["clip_tokens"][part].astype(np.int64)).to(self.device)
            embeds["image_embed"].append(self._clip.encode_image(pixels))
            embeds["text_embed"].append(self._clip.encode_text(tokens))
        added = {name: torch.cat(parts).to(torch.float16).cpu().numpy() for name, parts in embeds.items()}
        return {name: array for name, array in batch.items() if name not in CLIP_INPUTS} | added


class EmbeddingStatistics:
    """Mean and variance of vectors seen in any order and in any number of processes, in float64.

    Merging follows Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".
    """

    def __init__(self, count: int = 0, mean: npt.ArrayLike = 0.0, m2: npt.ArrayLike = 0.0) -> None:
        self.count = count
        self.mean = np.asarray(mean, dtype=np.float64)
        self.m2 = np.asarray(m2, dtype=np.float64)

    def update(self, vectors: npt.NDArray[Any]) -> None:
        """Takes in (B, D) vectors."""
        values = vectors.astype(np.float64)
        if len(values):
            mean = values.mean(axis=0)
            self.merge(EmbeddingStatistics(len(values), mean, ((values - mean) ** 2).sum(axis=0)))

    def merge(self, other: EmbeddingStatistics) -> None:
        """Takes in what another one has seen."""
        count = self.count + other.count
        if count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        self.count = count

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """(D,) population standard deviation."""
        return np.sqrt(self.m2 / max(self.count, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest."""
        return {"count": self.count, "mean": self.mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(data["count"], data["mean"], data["m2"])


class EmbeddingCovariance:
    """Mean and covariance of vectors seen in any order and in any number of processes, in float64.

    Merged like `EmbeddingStatistics`; `scatter` (D, D) is the sum of outer products of deviations from the mean.
    """

    def __init__(self, embed_dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(embed_dim)
        self.scatter = np.zeros((embed_dim, embed_dim))

    def update(self, vectors: npt.NDArray[Any]) -> None:
        """Takes in (B, D) vectors."""
        values = vectors.astype(np.float64)
        if len(values):
            part = EmbeddingCovariance(values.shape[1])
            part.count, part.mean = len(values), values.mean(axis=0)
            centred = values - part.mean
            part.scatter = centred.T @ centred
            self.merge(part)

    def merge(self, other: EmbeddingCovariance) -> None:
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
