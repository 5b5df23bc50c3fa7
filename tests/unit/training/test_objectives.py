"""Losses against computations of their own: formulas written out here, open_clip's loss, plain autograd."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from unclip.models.normalizer import EmbeddingNormalizerConfig
from unclip.pipelines.stages import DecoderStageConfig, PriorStageConfig, UpsamplerStageConfig
from unclip.recipes.clip import tiny_architecture
from unclip.training.objectives import Objective
from unclip.training.objectives.base import BaseObjectiveConfig
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig, known_mask
from unclip.training.objectives.prior import PriorObjectiveConfig
from unclip.training.objectives.upsampler import UpsamplerObjectiveConfig
from unclip.utils.random import SampleGenerator

T, D, LENGTH, END = 50, 6, 5, 19
SEED = 3
TEXT = {"context_length": LENGTH, "width": 8, "depth": 1, "heads": 2, "vocab_size": END + 1}
PIXELS = {"num_train_timesteps": T}
SAMPLING = {"num_inference_steps": 2}
Batch = dict[str, torch.Tensor]


def unet(**changes: Any) -> dict[str, Any]:
    return {"channels": 8, "channel_mult": [1, 2], "depth": 1, "head_channels": 8, "image_size": 8} | changes


def prior(**changes: Any) -> PriorObjectiveConfig:
    stage = {
        "model": {"embed_dim": D, **TEXT},
        "diffusion": {**PIXELS, "prediction_type": "sample"},
        "sampling": SAMPLING,
        "normalizer": {"mean": 0.1, "std": 0.25},
    }
    return PriorObjectiveConfig(stage=PriorStageConfig.from_dict(stage), **changes)


def decoder(*, variance_type: str = "learned_range", **changes: Any) -> DecoderObjectiveConfig:
    stage = {
        "model": {
            "unet": unet(out_channels=6 if variance_type == "learned_range" else 3, attention_resolutions=[4]),
            "text": TEXT,
            "embed_dim": D,
        },
        "diffusion": {**PIXELS, "variance_type": variance_type},
        "sampling": SAMPLING,
        "normalizer": {"mean": 0.1, "std": 0.25},
        "image_size": 8,
    }
    return DecoderObjectiveConfig(stage=DecoderStageConfig.from_dict(stage), **changes)


STATES, CLASSES = 4, ("cat", "dog", "owl")
VARIANTS = {
    "glide": {"model": {"embed_dim": None}},
    "states": {"model": {"text": None, "text_states": {"context_length": LENGTH, "state_dim": STATES, "width": 8}}},
    "adm": {
        "model": {"text": None, "embed_dim": None, "num_classes": len(CLASSES)},
        "label_column": "kind",
        "classes": CLASSES,
    },
    "inpainting": {"model": {"inpainting": True, "unet": {"in_channels": 7}}},
}


def variant(name: str, *, variance_type: str = "learned_range", **changes: Any) -> DecoderObjectiveConfig:
    """A decoder that is told something else than unCLIP's."""
    stage = decoder(variance_type=variance_type).stage.merged(VARIANTS[name])
    return DecoderObjectiveConfig(stage=stage, **changes)


def upsampler(*, noise_conditioning: bool = False) -> UpsamplerObjectiveConfig:
    stage = {
        "kind": "upsampler_256",
        "model": {"unet": unet(in_channels=6, image_size=32), "noise_conditioning": noise_conditioning},
        "diffusion": {**PIXELS, "beta_schedule": "squaredcos_cap_v2"},
        "sampling": SAMPLING,
        "low_res_size": 8,
        "image_size": 32,
    }
    return UpsamplerObjectiveConfig(stage=UpsamplerStageConfig.from_dict(stage), degradation="none")


def build(config: BaseObjectiveConfig) -> Objective:
    """With weights that are nowhere zero, so that every input counts."""
    torch.manual_seed(0)
    objective = config.build()
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def make_batch(count: int, seed: int = 1) -> Batch:
    """What the stream delivers, of every column that any of these objectives takes."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, END, (count, LENGTH), generator=random, dtype=torch.int32)
    tokens[:, -2] = END
    tokens[:, -1] = 0
    return {
        "id": torch.arange(count) + 1000,
        "position": torch.randint(10**6, (count,), generator=random),
        "tokens": tokens,
        "image_embed": torch.randn(count, D, generator=random).half(),
        "text_embed": torch.randn(count, D, generator=random).half(),
        "text_states": torch.randn(count, LENGTH * STATES, generator=random).half(),
        "label": torch.randint(len(CLASSES), (count,), generator=random),
        "image": torch.randint(256, (count, 8, 8, 3), generator=random, dtype=torch.uint8),
        "low_res": torch.randint(256, (count, 2, 2, 3), generator=random, dtype=torch.uint8),
    }


def streams(batch: Batch) -> SampleGenerator:
    return SampleGenerator.for_samples(SEED, batch["position"])


class Recorded(nn.Module):
    """Calls the network and keeps what it was given and what it answered."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        self.x_t, self.timesteps, self.cond = x_t, timesteps, cond
        self.output = self.network(x_t, timesteps, cond)
        return self.output


class Zero(nn.Module):
    """Answers zeros, so that many samples cost nothing."""

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        return torch.zeros_like(x_t)


def cosine_alphas_cumprod() -> np.ndarray:
    """Nichol and Dhariwal 2021, equation 17, with betas of at most 0.999."""
    angle = (np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2
    f = np.cos(angle) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


def noised(x_start: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, noise and timesteps as the samples' own streams say, by the formula of the forward process."""
    generator = streams(batch)
    timesteps, noise = generator.integers(T), generator.normal(tuple(x_start.shape[1:]))
    abar = torch.from_numpy(cosine_alphas_cumprod()).float()[timesteps].view(-1, *[1] * (x_start.ndim - 1))
    return abar.sqrt() * x_start + (1 - abar).sqrt() * noise, noise, timesteps


def pixels(image: torch.Tensor) -> torch.Tensor:
    return image.permute(0, 3, 1, 2).float() / 127.5 - 1


# --- prior ------------------------------------------------------------------------------------------------------------


def test_the_prior_learns_the_normalised_embedding_itself() -> None:
    objective, batch = build(prior()), make_batch(7)
    network = Recorded(objective.model)
    output = objective.loss(network, batch, streams(batch))
    z = (batch["image_embed"].float() - 0.1) / 0.25
    x_t, _, timesteps = noised(z, batch)
    torch.testing.assert_close(network.x_t, x_t)
    assert torch.equal(network.timesteps, timesteps)
    torch.testing.assert_close(network.cond.text_embed, batch["text_embed"].float())
    assert network.cond.text_mask.tolist() == [[True] * 4 + [False]] * 7
    torch.testing.assert_close(output.loss, ((network.output - z) ** 2).mean())
    torch.testing.assert_close(output.metrics["mse"], output.loss.detach())
    assert not output.metrics["mse"].requires_grad


@pytest.mark.parametrize("changed", ["tokens", "text_embed"])
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_prior_without_text_does_not_depend_on_it(changed: str, drop: float) -> None:
    assert depends(prior(text_drop_prob=drop), changed) == (drop == 0.0)


def test_the_prior_sees_the_noised_embedding_even_without_text() -> None:
    assert depends(prior(text_drop_prob=1.0), "image_embed")


# --- decoder ----------------------------------------------------------------------------------------------------------


def test_the_decoder_learns_noise_and_variance() -> None:
    objective, batch = build(decoder()), make_batch(7)
    network = Recorded(objective.model)
    output = objective.loss(network, batch, streams(batch))
    x_t, noise, timesteps = noised(pixels(batch["image"]), batch)
    torch.testing.assert_close(network.x_t, x_t)
    assert torch.equal(network.timesteps, timesteps)
    torch.testing.assert_close(network.cond.image.embed, (batch["image_embed"].float() - 0.1) / 0.25)
    mse = ((network.output[:, :3] - noise) ** 2).mean()
    torch.testing.assert_close(output.metrics["mse"], mse)
    assert output.metrics["vlb"] > 0
    torch.testing.assert_close(output.loss, mse + output.metrics["vlb"] * T / 1000)


def test_the_bound_teaches_the_variance_and_nothing_else_does() -> None:
    """The gradient at the variance channels is there with the hybrid loss; without them there is no such term."""
    objective, batch = build(decoder()), make_batch(3)
    network = Recorded(objective.model)
    loss = objective.loss(network, batch, streams(batch)).loss
    (gradient,) = torch.autograd.grad(loss, network.output)
    assert gradient[:, 3:].abs().amax() > 0
    noise = noised(pixels(batch["image"]), batch)[1]
    torch.testing.assert_close(gradient[:, :3], 2 * (network.output[:, :3] - noise) / noise.numel())
    objective = build(decoder(variance_type="fixed_small"))
    output = objective.loss(objective.model, batch, streams(batch))
    assert "vlb" not in output.metrics
    torch.testing.assert_close(output.loss, output.metrics["mse"])


@pytest.mark.parametrize(
    ("image_drop", "text_drop", "seen"),
    [(0.0, 0.0, {"image_embed", "tokens"}), (1.0, 0.0, {"tokens"}), (0.0, 1.0, {"image_embed"}), (1.0, 1.0, set())],
)
def test_the_decoder_sees_what_is_not_dropped(image_drop: float, text_drop: float, seen: set[str]) -> None:
    config = decoder(image_drop_prob=image_drop, text_drop_prob=text_drop)
    assert {name for name in ("image_embed", "tokens", "text_embed") if depends(config, name)} == seen


@pytest.mark.parametrize(
    ("name", "drop", "seen"),
    [
        ("glide", 0.0, {"tokens"}),
        ("glide", 1.0, set()),
        ("states", 0.0, {"image_embed", "text_states"}),
        ("states", 1.0, set()),
        ("adm", 0.0, {"label"}),
        ("adm", 1.0, set()),
    ],
)
def test_other_decoders_see_what_is_not_dropped(name: str, drop: float, seen: set[str]) -> None:
    config = variant(name, image_drop_prob=drop, text_drop_prob=drop, label_drop_prob=drop)
    found = {column for column in ("image_embed", "tokens", "text_states", "label") if depends(config, column)}
    assert found == seen
    assert depends(config, "image")


def test_decoders_ask_for_what_they_are_told() -> None:
    specs = {name: variant(name).batch_spec() for name in VARIANTS}
    assert specs["glide"].columns() == ("id", "image", "caption")
    assert specs["states"].columns() == ("id", "image", "caption", "image_embed", "text_states")
    assert specs["adm"].columns() == ("id", "image", "kind")
    assert specs["adm"].classes == CLASSES
    assert variant("glide").with_embeddings(D + 1, None) == variant("glide")


def test_text_states_are_rows_of_the_states_of_the_tokens() -> None:
    objective, batch = build(variant("states")), make_batch(3)
    network = Recorded(objective.model)
    objective.loss(network, batch, streams(batch))
    states = network.cond.text.states
    assert states.shape == (3, LENGTH, STATES)
    torch.testing.assert_close(states[:, 1], batch["text_states"][:, STATES : 2 * STATES])
    assert network.cond.text.mask.tolist() == [[True] * 4 + [False]] * 3


def test_classes_are_dropped_at_their_rate() -> None:
    count = 20_000
    objective, batch = build(variant("adm", variance_type="fixed_small", label_drop_prob=0.2)), make_batch(count)
    batch["position"] = torch.arange(count)
    network = Recorded(Zero())
    metrics = objective.loss(network, batch, streams(batch)).metrics
    share = network.cond.label.dropped.float().mean()
    assert float(share) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / count))
    torch.testing.assert_close(metrics["share_without_label"], share)


def test_inpainting_shows_the_known_part_of_the_picture_itself() -> None:
    objective, batch = build(variant("inpainting")), make_batch(5)
    network = Recorded(objective.model)
    objective.loss(network, batch, streams(batch))
    torch.testing.assert_close(network.cond.known, pixels(batch["image"]))
    torch.testing.assert_close(network.cond.known_mask, known_mask(streams(batch).child("known"), 8))


def test_known_masks_are_rectangles_their_complements_or_nothing() -> None:
    count, size = 3000, 16
    generator = SampleGenerator.for_samples(0, torch.arange(count))
    masks = known_mask(generator, size)[:, 0]
    assert masks.unique().tolist() == [0, 1]
    nothing = ~masks.flatten(1).any(dim=1)
    inside = masks.bool()
    corner = inside[:, 0, 0] | inside[:, 0, -1] | inside[:, -1, 0] | inside[:, -1, -1]
    outside = corner & ~is_rectangle(inside)
    assert (is_rectangle(inside) | is_rectangle(~inside) | nothing).all()
    assert float(nothing.float().mean()) == pytest.approx(1 / 3, abs=0.1)  # and rectangles without a pixel
    assert float(outside.float().mean()) > 0.2
    assert masks.mean(dim=0).std() < 0.2  # no place is known always or never
    part = known_mask(SampleGenerator.for_samples(0, torch.arange(7, 9)), size)[:, 0]
    torch.testing.assert_close(part, masks[7:9])


def is_rectangle(mask: torch.Tensor) -> torch.Tensor:
    """(B, H, W) bool -> (B,): whether the pixels are all of some rows and columns that are next to each other."""
    rows, columns = mask.any(dim=2), mask.any(dim=1)
    full = rows[:, :, None] & columns[:, None, :]
    runs = [(side[:, 1:] != side[:, :-1]).sum(dim=1) + side[:, 0] + side[:, -1] <= 2 for side in (rows, columns)]
    return (full == mask).flatten(1).all(dim=1) & runs[0] & runs[1] & rows.any(dim=1)


def test_shares_of_what_is_dropped_are_products_of_the_rates() -> None:
    count = 20_000
    objective, batch = build(decoder(variance_type="fixed_small")), make_batch(count)
    batch["position"] = torch.arange(count)
    network = Recorded(Zero())
    metrics = objective.loss(network, batch, streams(batch)).metrics
    expected = {"share_both": 0.45, "share_image_only": 0.45, "share_text_only": 0.05, "share_neither": 0.05}
    for name, rate in expected.items():
        assert float(metrics[name]) == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / count)), name
    image_dropped, text_dropped = network.cond.image.dropped, network.cond.text.dropped
    assert float((image_dropped & ~text_dropped).float().mean()) == pytest.approx(float(metrics["share_text_only"]))
    # Neither goes with the timestep: its mean has a standard error of T / sqrt(12 n).
    for dropped in (image_dropped, text_dropped):
        of_dropped = network.timesteps[dropped].float().mean()
        assert float(of_dropped) == pytest.approx((T - 1) / 2, abs=4 * T / math.sqrt(12 * int(dropped.sum())))


def test_the_prior_drops_text_at_its_rate() -> None:
    count = 20_000
    objective, batch = build(prior()), make_batch(count)
    batch["position"] = torch.arange(count)
    network = Recorded(Zero())
    objective.loss(network, batch, streams(batch))
    assert float(network.cond.text_dropped.float().mean()) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / count))


# --- upsampler --------------------------------------------------------------------------------------------------------


def test_the_upsampler_learns_noise_given_the_small_picture() -> None:
    objective, batch = build(upsampler()), make_batch(5)
    network = Recorded(objective.model)
    output = objective.loss(network, batch, streams(batch))
    x_t, noise, _ = noised(pixels(batch["image"]), batch)
    torch.testing.assert_close(network.x_t, x_t)
    small = torch.nn.functional.interpolate(pixels(batch["low_res"]), scale_factor=4, mode="bilinear")
    torch.testing.assert_close(network.cond.low_res, small)
    assert network.cond.noise_level is None
    torch.testing.assert_close(output.loss, ((network.output - noise) ** 2).mean())
    assert depends(upsampler(), "low_res")
    assert not depends(upsampler(), "tokens")


def test_noise_conditioning_draws_a_level_for_each_sample() -> None:
    count = 2000
    objective, batch = build(upsampler(noise_conditioning=True)), make_batch(count)
    batch["position"], batch["low_res"] = torch.arange(count), torch.full((count, 2, 2, 3), 128, dtype=torch.uint8)
    network = Recorded(Zero())
    objective.loss(network, batch, streams(batch))
    level = network.cond.noise_level
    assert set(level.tolist()) == set(range(T))
    # It is the level of the noise that is there, and not that of x_t.
    noise = (network.cond.low_res - objective.process.alphas_cumprod(level).sqrt().view(-1, 1, 1, 1) / 255).square()
    expected = 1 - cosine_alphas_cumprod()[level.numpy()]
    # At the corners, the interpolation of 2 x 2 pixels to 8 x 8 takes one pixel alone.
    corners = noise[:, :, ::7, ::7].mean(dim=(1, 2, 3)).numpy()
    assert np.corrcoef(corners, expected)[0, 1] > 0.6
    assert corners.mean() == pytest.approx(expected.mean(), rel=0.05)
    assert abs(np.corrcoef(level.numpy(), network.timesteps.numpy())[0, 1]) < 0.1


def test_the_upsampler_asks_for_crops_with_their_condition() -> None:
    spec = upsampler().batch_spec()
    assert (spec.image_size, spec.crop_size, spec.low_res_size) == (32, 8, 2)
    with pytest.raises(ValueError, match=r"crop_fraction 0\.1 of image_size 32"):
        UpsamplerObjectiveConfig(stage=upsampler().stage, degradation="none", crop_fraction=0.1)


# --- all diffusion stages ---------------------------------------------------------------------------------------------

CONFIGS = {
    "prior": prior(),
    "decoder": decoder(),
    **{name: variant(name) for name in VARIANTS},
    "upsampler": upsampler(),
    "noised upsampler": upsampler(noise_conditioning=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loss_is_the_mean_of_its_samples_losses(name: str) -> None:
    """So micro-batches and workers can be cut at will: what is drawn for a sample is its own."""
    objective, batch = build(CONFIGS[name]), make_batch(6)
    whole = objective.loss(objective.model, batch, streams(batch))
    singles = []
    for index in reversed(range(6)):
        single = {key: value[index : index + 1] for key, value in batch.items()}
        singles.append(objective.loss(objective.model, single, streams(single)))
    torch.testing.assert_close(whole.loss, torch.stack([single.loss for single in singles]).mean())
    for key, value in whole.metrics.items():
        torch.testing.assert_close(value, torch.stack([single.metrics[key] for single in singles]).mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_stay_as_they_are(name: str) -> None:
    objective, batch = build(CONFIGS[name]), make_batch(4)
    before = {key: value.clone() for key, value in batch.items()}
    objective.loss(objective.model, batch, streams(batch)).loss.backward()
    objective.after_backward()
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def depends(config: BaseObjectiveConfig, name: str) -> bool:
    """Whether the loss changes when another batch's `name` is put in."""
    objective, batch = build(config), make_batch(5)
    changed = batch | {name: make_batch(5, seed=2)[name]}
    losses = [objective.loss(objective.model, given, streams(given)).loss for given in (batch, changed)]
    return not torch.equal(*losses)


# --- fitting to embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [prior(), decoder()], ids=["prior", "decoder"])
def test_normalisers_follow_the_embeddings(config: PriorObjectiveConfig | DecoderObjectiveConfig) -> None:
    scaled = config.with_embeddings(D, None).stage.normalizer
    assert scaled == EmbeddingNormalizerConfig(mean=0.0, std=1 / (17.2 * math.sqrt(D / 1024)))
    statistics = {"mean": [0.5] * D, "std": [2.0] * (D - 1) + [0.0], "count": 9}
    whitened = config.model_copy(update={"normalization": "whiten"}).with_embeddings(D, statistics).stage.normalizer
    assert whitened.mean == (0.5,) * D
    assert whitened.std == (2.0,) * (D - 1) + (0.002,)  # a component that never moves must not blow up


# --- clip -------------------------------------------------------------------------------------------------------------


def clip_batch(count: int) -> Batch:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 400, (count, 16), generator=random, dtype=torch.int32)
    tokens[:, -1] = 49407
    image = torch.randint(256, (count, 32, 32, 3), generator=random, dtype=torch.uint8)
    return {"position": torch.arange(count), "image": image, "tokens": tokens}


def open_clip_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = open_clip.ClipLoss()(*model(batch["image"], batch["tokens"]))
    return loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_contrastive_loss_is_open_clips() -> None:
    objective, batch = build(ClipObjectiveConfig(architecture=tiny_architecture())), clip_batch(6)
    reference = copy.deepcopy(objective.model)
    output = objective.loss(objective.model, batch, streams(batch))
    output.loss.backward()
    expected = open_clip_loss(reference, batch)
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    ours, theirs = gradients(objective.model), gradients(reference)
    assert ours.keys() == theirs.keys() == dict(objective.model.named_parameters()).keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient)
    image, text, scale = objective.model(batch["image"], batch["tokens"])
    found = (image @ text.T).argmax(dim=1) == torch.arange(6)
    assert float(output.metrics["accuracy"]) == pytest.approx(float(found.float().mean()))
    torch.testing.assert_close(output.metrics["logit_scale"], scale.detach())


def test_sharpness_aware_minimisation_takes_the_gradient_uphill_and_comes_back() -> None:
    rho = 0.3
    config = ClipObjectiveConfig(architecture=tiny_architecture(), sam_rho=rho)
    objective, batch = build(config), clip_batch(6)
    before = {name: parameter.detach().clone() for name, parameter in objective.model.named_parameters()}
    uphill = copy.deepcopy(objective.model)
    open_clip_loss(uphill, batch).backward()
    first = gradients(uphill)
    norm = torch.cat([gradient.flatten() for gradient in first.values()]).norm()
    with torch.no_grad():
        for name, parameter in uphill.named_parameters():
            parameter.add_(rho * first[name] / norm)
    uphill.zero_grad()
    expected = open_clip_loss(uphill, batch)
    expected.backward()

    output = objective.loss(objective.model, batch, streams(batch))
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected)
    ours = gradients(objective.model)
    for name, gradient in gradients(uphill).items():  # by norm: single elements near zero are all rounding
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert any(not torch.allclose(ours[name], first[name], rtol=0.05) for name in first)
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in objective.model.named_parameters()]).norm()
    assert float(moved) == pytest.approx(rho, rel=1e-4)
    objective.after_backward()
    assert all(torch.equal(parameter, before[name]) for name, parameter in objective.model.named_parameters())
