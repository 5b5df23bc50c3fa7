"""Red, green and blue squares on grey, and a classifier that has seen them at every noise level."""

from __future__ import annotations

from typing import Any

import torch

from unclip.models.classifier import ClassifierModel
from unclip.pipelines.stages import ClassifierStageConfig
from unclip.training.objectives.classifier import ClassifierObjectiveConfig
from unclip.utils.random import SampleGenerator

SIDE = 8
COLOURS = ("red", "green", "blue")
STAGE: dict[str, Any] = {
    "model": {
        "encoder": {
            "channels": 16,
            "channel_mult": [1, 2],
            "depth": 1,
            "attention_resolutions": [4],
            "head_channels": 16,
            "image_size": SIDE,
        }
    },
    "diffusion": {"num_train_timesteps": 100},
    "label_column": "colour",
    "classes": COLOURS,
}


def coloured_squares(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (count, SIDE, SIDE, 3) and the position of each one's colour (count,) int64."""
    random = torch.Generator().manual_seed(seed)
    label = torch.randint(len(COLOURS), (count,), generator=random)
    corners = torch.randint(SIDE - 3, (count, 2), generator=random)
    pictures = torch.full((count, SIDE, SIDE, 3), 128, dtype=torch.uint8)
    for picture, colour, (top, left) in zip(pictures, label, corners.tolist(), strict=True):
        square = picture[top : top + 4, left : left + 4]
        square.zero_()
        square[..., colour] = 255
    return pictures, label


def trained_classifier(steps: int = 150) -> ClassifierModel:
    """A few seconds of training on pictures that are new in every step."""
    torch.manual_seed(0)
    objective = ClassifierObjectiveConfig(stage=ClassifierStageConfig.from_dict(STAGE)).build()
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=3e-3)
    for step in range(steps):
        image, label = coloured_squares(64, seed=1000 + step)
        position = torch.arange(64) + 64 * step
        batch = {"image": image, "label": label, "position": position}
        output = objective.loss(objective.model, batch, SampleGenerator.for_samples(0, position))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model = objective.model.eval().requires_grad_(False)
    assert isinstance(model, ClassifierModel)
    return model
