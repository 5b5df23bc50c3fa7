"""The noised CLIP's loss against open_clip's on pictures noised by the formula, and that it can be driven to nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss

from unclip.models.noised_clip import NoisedClipModel
from unclip.pipelines.stages import NoisedClipStageConfig
from unclip.training.objectives import Objective
from unclip.training.objectives.noised_clip import NoisedClipObjectiveConfig
from unclip.utils.random import SampleGenerator

T, SIDE, LENGTH, END = 50, 8, 5, 19
STAGE: dict[str, Any] = {
    "model": {
        "embed_dim": 16,
        "image_size": SIDE,
        "patch_size": 4,
        "width": 32,
        "depth": 1,
        "heads": 2,
        "text": {"vocab_size": END + 1, "context_length": LENGTH, "width": 16, "depth": 1, "heads": 2},
    },
    "diffusion": {"num_train_timesteps": T},
}
CONFIG = NoisedClipObjectiveConfig(stage=NoisedClipStageConfig.from_dict(STAGE))


@pytest.fixture
def objective() -> Objective:
    torch.manual_seed(0)
    return CONFIG.build()


def make_batch(count: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, END, (count, LENGTH), generator=random, dtype=torch.int32)
    tokens[:, -1] = END
    image = torch.randint(256, (count, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)
    return {"position": torch.arange(count) + 100, "tokens": tokens, "image": image}


def streams(batch: dict[str, torch.Tensor]) -> SampleGenerator:
    return SampleGenerator.for_samples(3, batch["position"])


def test_the_stage_says_which_batches_it_needs() -> None:
    spec = CONFIG.batch_spec()
    assert (spec.image_size, spec.tokenizer, spec.context_length) == (SIDE, "simple", LENGTH)
    assert spec.columns() == ("id", "image", "caption")
    assert CONFIG.stage_config().kind == "noised_clip"


def test_the_loss_is_open_clips_on_noised_pictures(objective: Objective) -> None:
    batch = make_batch(6)
    model = objective.model
    assert isinstance(model, NoisedClipModel)
    output = objective.loss(model, batch, streams(batch))
    generator = streams(batch)
    timesteps, noise = generator.integers(T), generator.normal((3, SIDE, SIDE))
    abar = CONFIG.stage.diffusion.build().alphas_cumprod(timesteps).float().view(-1, 1, 1, 1)
    x_t = abar.sqrt() * (batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1) + (1 - abar).sqrt() * noise
    image, text = model.encode_image(x_t, timesteps), model.encode_text(batch["tokens"])
    torch.testing.assert_close(output.loss, ClipLoss()(image, text, model.logit_scale))
    torch.testing.assert_close(output.metrics["logit_scale"], model.logit_scale.detach())
    found = (image @ text.T).argmax(dim=1) == torch.arange(6)
    torch.testing.assert_close(output.metrics["accuracy"], found.float().mean())


def test_every_parameter_learns(objective: Objective) -> None:
    batch = make_batch(6)
    batch["tokens"][0, 2:] = torch.tensor([END, 0, 0])  # a short caption: padding is learned too
    objective.loss(objective.model, batch, streams(batch)).loss.backward()
    still = [name for name, p in objective.model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


def test_it_overfits_a_few_noised_pairs(objective: Objective) -> None:
    batch = make_batch(8)
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=3e-3)
    for _ in range(120):
        output = objective.loss(objective.model, batch, streams(batch))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert float(output.loss.detach()) < 0.05  # from log 8 = 2.1
    assert float(output.metrics["accuracy"]) == 1
