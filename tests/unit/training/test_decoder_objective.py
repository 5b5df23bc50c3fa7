"""What decoders of every kind learn, by formulas written out here, and what of their inputs they see."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.objectives import (
    CLASSES,
    LENGTH,
    STATES,
    VARIANTS,
    D,
    Recorded,
    T,
    Zero,
    build,
    decoder,
    depends,
    make_batch,
    noised,
    pixels,
    streams,
    variant,
)

from unclip.training.objectives.decoder import known_mask
from unclip.utils.random import SampleGenerator


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
