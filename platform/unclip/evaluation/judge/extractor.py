"""The judge as a network of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from unclip.data.batches import Batch
from unclip.data.decode import Picture
from unclip.evaluation.extractors import RESIZE, central_square
from unclip.evaluation.judge.folder import Judge
from unclip.evaluation.judge.network import as_ink

JUDGE = "judge"
"""The column of its answers: log-probabilities of all classes, attribute after attribute; 0 where it does not know the
caption."""


class JudgeExtractor:
    """What attributes pictures show. Each is judged by the network that has seen no real picture of its caption.

    Args:
        judge: whose networks they are.
    """

    columns: tuple[str, ...] = (JUDGE,)

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._networks: list[nn.Module] = []
        self._device = "cpu"

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "source": self.judge.uri,
            "sha256": self.judge.fingerprint,
            "image_size": self.judge.image_size,
            "resize": RESIZE,
            "attributes": list(self.judge.classes),
            "features": "log-probabilities of the classes of each attribute",
        }

    def prepare(self, pictures: Sequence[Picture], captions: Sequence[str | None]) -> Batch:
        known = self.judge.captions
        rows = [known.rows.get(caption or "") for caption in captions]  # the judge knows no empty one
        folds = [-1 if row is None else known.folds[row] for row in rows]
        squares = [central_square(picture, self.judge.image_size) for picture in pictures]
        return {"judge_image": np.stack(squares), "judge_fold": np.array(folds, dtype=np.int64)}

    def setup(self, device: str) -> None:
        self._device = device
        self._networks = [self.judge.network(fold, device) for fold in range(self.judge.facts["config"]["folds"])]

    def extract(self, inputs: Batch) -> Batch:
        assert self._networks, "setup() comes before extract()"
        folds = inputs["judge_fold"]
        answers = np.zeros((len(folds), sum(map(len, self.judge.classes.values()))), dtype=np.float32)
        for fold in np.unique(folds[folds >= 0]):
            logits = self._networks[fold](as_ink(inputs["judge_image"][folds == fold]).to(self._device))
            said = torch.cat([of_attribute.log_softmax(1) for of_attribute in logits], dim=1)
            answers[folds == fold] = said.cpu().numpy()
        return {JUDGE: answers}
