"""Inpainting: what is kept is the picture's, bit by bit at every size, and the seam takes nothing of what was erased."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unclip.data.transforms import area_downscale
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.known import KnownPixels, known_at
from unclip.pipelines.manipulations.inpainting import inpainting, on_canvas
from unclip.pipelines.pictures import to_signed
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStage
from unclip.utils.random import SampleGenerator

PROMPT, SEEDS, SIZES = "a red circle", [7, 8], (16, 32, 64)
SAMPLERS = {
    "ddpm": {"decoder": {"sampler": "ddpm"}},
    "ddim": {"decoder": {"sampler": "ddim", "guidance_scale": 1.0}, "upsampler_256": {"eta": 1.0}},
    "dpm": {"decoder": {"sampler": "dpmsolver++"}, "upsampler_1024": {"sampler": "dpmsolver++"}},
}


def picture(size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def blocks(keep: np.ndarray, size: int) -> np.ndarray:
    """Which of the small picture's pixels are kept all over, one by one."""
    factor = len(keep) // size
    return np.array(
        [
            [keep[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].all() for x in range(size)]
            for y in range(size)
        ]
    )


@pytest.mark.parametrize("changes", SAMPLERS.values(), ids=SAMPLERS)
def test_known_pixels_are_exact_at_every_size(tiny_pipeline: Pipeline, changes: dict[str, object]) -> None:
    original, keep = picture(), np.ones((64, 64), dtype=bool)
    keep[13:40, 21:50] = False
    options = GenerationOptions().merged(changes)
    found = inpainting(tiny_pipeline, original, keep, PROMPT, SEEDS, feather=1 / 16, options=options)
    free = tiny_pipeline([PROMPT] * 2, SEEDS, options=options)
    for size in SIZES:
        small, kept = area_downscale(original, size), blocks(keep, size)
        for row in (0, 1):
            np.testing.assert_array_equal(found.images[size][row][kept], small[kept])
        assert np.abs(found.images[size][0].astype(int) - found.images[size][1].astype(int))[~kept].max() > 2
    # The decoder saw the known pixels: what it drew among them is not what it draws without.
    unknown = ~blocks(keep, 16)
    assert np.abs(found.images[16].astype(int) - free.images[16].astype(int))[:, unknown].max() > 2


def test_with_nothing_kept_it_is_text_to_image(tiny_pipeline: Pipeline) -> None:
    found = inpainting(tiny_pipeline, picture(), np.zeros((64, 64), dtype=bool), PROMPT, SEEDS)
    free = tiny_pipeline([PROMPT] * 2, SEEDS)
    for size in SIZES:
        np.testing.assert_array_equal(found.images[size], free.images[size])


def test_what_is_erased_has_no_influence(tiny_pipeline: Pipeline) -> None:
    keep = np.ones((64, 64), dtype=bool)
    keep[16:48, 16:48] = False
    one, other = picture(), picture()
    other[~keep] = 0
    found = [inpainting(tiny_pipeline, original, keep, PROMPT, SEEDS, feather=1 / 16) for original in (one, other)]
    for size in SIZES:
        np.testing.assert_array_equal(found[0].images[size], found[1].images[size])


def test_a_seed_gives_the_same_alone(tiny_pipeline: Pipeline) -> None:
    keep = np.zeros((64, 64), dtype=bool)
    keep[:, :32] = True
    both = inpainting(tiny_pipeline, picture(), keep, PROMPT, SEEDS)
    alone = inpainting(tiny_pipeline, picture(), keep, PROMPT, SEEDS[1:])
    split = inpainting(
        tiny_pipeline, picture(), keep, PROMPT, SEEDS, options=GenerationOptions().merged({"max_pixels": 1})
    )
    for size in SIZES:
        assert np.abs(alone.images[size][0].astype(int) - both.images[size][1].astype(int)).max() <= 2
        assert np.abs(split.images[size].astype(int) - both.images[size].astype(int)).max() <= 2


def test_a_decoder_trained_to_inpaint_is_told_the_known_pixels(tiny_pipeline: Pipeline) -> None:
    config = tiny_pipeline.decoder.config.merged({"model": {"inpainting": True, "unet": {"in_channels": 7}}})
    torch.manual_seed(0)
    network = config.build()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    prepare = network.prepare
    network.prepare = lambda cond: seen.append((cond.known, cond.known_mask)) or prepare(cond)  # type: ignore
    pipeline = Pipeline(DecoderStage(config, network), clip=tiny_pipeline.clip, prior=tiny_pipeline.prior)
    keep = np.zeros((16, 16), dtype=bool)
    keep[:, :8] = True
    original = picture(16)
    found = inpainting(pipeline, original, keep, PROMPT, [7])
    np.testing.assert_array_equal(found.images[16][0][keep], original[keep])
    known, mask = seen[0]
    torch.testing.assert_close(mask[-1, 0] == 1, torch.from_numpy(keep))
    torch.testing.assert_close(
        known[-1].permute(1, 2, 0)[keep], to_signed(torch.from_numpy(original)[None])[0].permute(1, 2, 0)[keep]
    )


def test_the_seam_leads_from_one_side_to_the_other() -> None:
    """A known black half beside a drawn white one: grey rises with the distance, and reaches white behind the feather."""
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, :, :8] = True
    pixels = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    drawn = torch.full_like(pixels, 255)
    soft = KnownPixels(pixels, mask, feather=3).compose(drawn)[0, 8, :, 0].tolist()
    assert soft[:8] == [0] * 8
    assert soft[8:11] == [round(255 * (1 - share / 7)) for share in (3, 2, 1)]
    assert soft[11:] == [255] * 5
    assert KnownPixels(pixels, mask).compose(drawn)[0, 8, :, 0].tolist() == [0] * 8 + [255] * 8


@pytest.mark.parametrize(
    ("pixels", "mask"),
    [
        (torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, dtype=torch.bool)),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 8, 8)),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.bool)),
        (torch.zeros(1, 8, 9, 3, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.bool)),
    ],
)
def test_known_pixels_of_another_kind_are_refused(pixels: torch.Tensor, mask: torch.Tensor) -> None:
    """In particular masks of numbers: a soft one would be kept nowhere, without a word."""
    with pytest.raises(
        ValueError, match=r"known pixels must be uint8 \(B, S, S, 3\) with a mask bool \(B, S, S\), not"
    ):
        KnownPixels(pixels, mask)
    with pytest.raises(
        ValueError, match=r"known pixels must be uint8 \(B, S, S, 3\) with a mask bool \(B, S, S\), not"
    ):
        known_at(pixels, mask, [4], feather=0.0)


def test_feathers_are_shares_of_the_side() -> None:
    keep = torch.ones(1, 64, 64, dtype=torch.bool)
    known = known_at(torch.from_numpy(picture())[None], keep, SIZES, feather=1 / 16)
    assert {size: part.feather for size, part in known.items()} == {16: 1, 32: 2, 64: 4}
    with pytest.raises(ValueError, match="64x64 pixels cannot be scaled down evenly to 24x24"):
        known_at(torch.from_numpy(picture())[None], keep, [24], feather=0.0)


@pytest.mark.parametrize(
    ("place", "inside"),
    [
        ("centre", np.s_[24:40, 16:48]),
        ("left", np.s_[24:40, 0:32]),
        ("right", np.s_[24:40, 32:64]),
        ("top", np.s_[0:16, 16:48]),
        ("bottom", np.s_[48:64, 16:48]),
    ],
)
def test_a_picture_lies_on_its_canvas(place, inside) -> None:
    original = np.full((20, 40, 3), (200, 10, 30), dtype=np.uint8)
    canvas, keep = on_canvas(original, 64, share=0.5, place=place)
    expected = np.zeros((64, 64), dtype=bool)
    expected[inside] = True
    np.testing.assert_array_equal(keep, expected)
    assert (canvas[keep] == (200, 10, 30)).all()


def test_a_picture_of_its_size_on_the_canvas_keeps_its_pixels() -> None:
    original = SampleGenerator.for_samples(1, torch.arange(1)).integers(256)  # any
    pixels = picture(32) + int(original[0] % 2)
    canvas, keep = on_canvas(pixels, 64, share=0.5)
    np.testing.assert_array_equal(canvas[16:48, 16:48], pixels)
    assert keep.sum() == 32 * 32


def test_other_sizes_are_refused(tiny_pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"must be \(64, 64\), not \(32, 32\)"):
        inpainting(tiny_pipeline, picture(32), np.ones((32, 32), dtype=bool), PROMPT, SEEDS)
