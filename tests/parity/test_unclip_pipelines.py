"""Whole pipelines: diffusers' and ours, of one folder in Karlo's format, draw the same pictures from the same noise.

diffusers' schedulers have float32 tables, by which the last step alone is off by 5e-4; here they are given float64 ones. Ours
hands the small picture on in 8 bits, theirs does not; so here theirs is rounded too. Their noise is replaced by ours, draw by
draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers.schedulers.scheduling_unclip as scheduling
import numpy as np
import pytest
import torch
from diffusers import UnCLIPPipeline
from tests.support.karlo import CLIP_SIZE, LARGE, SIZE, make_karlo

from unclip.diffusion.schedules import beta_schedule
from unclip.interop.convert import ConvertConfig, run_convert
from unclip.interop.diffusers.load_pipeline import load
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import CascadeOutput, GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.utils.random import SampleGenerator

PROMPTS = ["a red square", "two blue circles"]
STEPS = {"prior": 4, "decoder": 5, "upsampler_256": 3}
SCALES = {"prior": 3.0, "decoder": 2.0}
OPTIONS = GenerationOptions.from_dict(
    {name: {"num_inference_steps": count} for name, count in STEPS.items()}
    | {name: {"num_inference_steps": STEPS[name], "guidance_scale": scale} for name, scale in SCALES.items()}
)


@pytest.fixture(scope="module")
def karlo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_karlo(tmp_path_factory.mktemp("karlo"))


@pytest.fixture(scope="module")
def bundle(karlo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("bundle") / "bundle", source=str(karlo), kind="diffusers")


@pytest.fixture(scope="module")
def exported(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("exported") / "theirs", source=str(bundle), to="diffusers")


def converted(out: Path, **fields: str) -> Path:
    list(run_convert(ConvertConfig(out=str(out), **fields)))
    return out


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every draw of our streams, in order: of each stage x_T and then one a step."""
    found: list[torch.Tensor] = []
    draw = SampleGenerator.normal

    def kept(generator: SampleGenerator, shape: tuple[int, ...]) -> torch.Tensor:
        noise = draw(generator, shape)
        found.append(noise.clone().contiguous())
        return noise

    monkeypatch.setattr(SampleGenerator, "normal", kept)
    return found


def by_stage(drawn: list[torch.Tensor], stages: tuple[str, ...]) -> dict[str, list[torch.Tensor]]:
    left: Iterator[torch.Tensor] = iter(drawn)
    return {name: [next(left) for _ in range(1 + STEPS[name])] for name in stages}


def with_float64_tables(pipeline: Any) -> Any:
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        scheduler = getattr(pipeline, name, None)
        if scheduler is not None:
            scheduler.betas = beta_schedule("squaredcos_cap_v2", 1000)
            scheduler.alphas = 1 - scheduler.betas
            scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return pipeline


def theirs(
    pipeline: Any, noise: dict[str, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch, **inputs: Any
) -> dict[str, np.ndarray]:
    """What diffusers makes of our noise: `embed` (B, D), and `small` and `large` (B, S, S, 3) from 0 to 255."""
    later = iter([tensor for draws in noise.values() for tensor in draws[1:-1]])  # it draws none for the last step
    monkeypatch.setattr(scheduling, "randn_tensor", lambda *_, **__: next(later))
    made: dict[str, np.ndarray] = {}
    step, counted = pipeline.decoder_scheduler.step, iter(range(STEPS["decoder"]))

    def rounded(*arguments: Any, **named: Any) -> Any:
        output = step(*arguments, **named)
        if next(counted) == STEPS["decoder"] - 1:
            levels = output.prev_sample.clamp(-1, 1).add(1).mul(127.5)
            made["small"] = levels.permute(0, 2, 3, 1).numpy()
            output.prev_sample = levels.round().div(127.5).sub(1)
        return output

    monkeypatch.setattr(pipeline.decoder_scheduler, "step", rounded)
    if "prior" in noise:
        finish = pipeline.prior.post_process_latents
        monkeypatch.setattr(
            pipeline.prior, "post_process_latents", lambda latents: made.setdefault("embed", finish(latents))
        )
        inputs |= {
            "prior_latents": noise["prior"][0],
            "prior_num_inference_steps": STEPS["prior"],
            "prior_guidance_scale": SCALES["prior"],
        }
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        decoder_latents=noise["decoder"][0],
        super_res_latents=noise["upsampler_256"][0],
        decoder_num_inference_steps=STEPS["decoder"],
        super_res_num_inference_steps=STEPS["upsampler_256"],
        decoder_guidance_scale=SCALES["decoder"],
        output_type="np",
        **inputs,
    ).images
    assert next(later, None) is None
    return made | {"large": images * 255}


def assert_same(made: dict[str, np.ndarray], ours: CascadeOutput, levels: float) -> None:
    """Within `levels` of 256 beside the rounding of ours to 8 bits, and not the same for want of a picture."""
    for name, size in (("small", SIZE), ("large", LARGE)):
        assert made[name].std() > 10, name
        assert np.abs(made[name] - ours.images[size]).max() <= 0.5 + levels, name


@pytest.mark.parametrize("direction", ["imported", "exported"])
def test_the_same_pictures_of_the_same_captions(
    direction: str,
    karlo: Path,
    bundle: Path,
    exported: Path,
    drawn: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = Pipeline.from_bundle(str(bundle))(PROMPTS, [1, 2], options=OPTIONS)
    noise = by_stage(drawn, ("prior", "decoder", "upsampler_256"))
    folder = karlo if direction == "imported" else exported
    made = theirs(with_float64_tables(load(folder)), noise, monkeypatch, prompt=PROMPTS)
    torch.testing.assert_close(ours.image_embed, made["embed"], rtol=1e-5, atol=1e-5)
    assert_same(made, ours, levels=1e-3)


def test_the_same_variations_of_pictures(
    exported: Path, bundle: Path, drawn: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pictures that CLIP sees pixel by pixel, so that resizing plays no part."""
    rows = torch.Generator().manual_seed(3)
    pictures = torch.randint(256, (2, CLIP_SIZE, CLIP_SIZE, 3), generator=rows, dtype=torch.uint8)
    pipeline = Pipeline.from_bundle(str(bundle))
    embeds = pipeline.encode_image(pictures)
    ours = pipeline.draw([1, 2], options=OPTIONS).cascade_of(prompts=["", ""], image_embed=embeds)
    noise = by_stage(drawn, ("decoder", "upsampler_256"))
    variation = with_float64_tables(load(exported, variation=True))
    pixels = variation.feature_extractor(images=list(pictures.numpy()), return_tensors="pt").pixel_values
    torch.testing.assert_close(variation.image_encoder(pixels).image_embeds, embeds, rtol=1e-5, atol=1e-5)
    assert_same(theirs(variation, noise, monkeypatch, image=pixels), ours, levels=1e-3)


def test_captions_are_guided_away_from_the_empty_caption(bundle: Path, drawn: list[torch.Tensor]) -> None:
    """Which is what both have in place of a learned one."""
    pipeline = Pipeline.from_bundle(str(bundle))
    plain = pipeline(PROMPTS, [1, 2], options=OPTIONS)
    away = pipeline(PROMPTS, [1, 2], negative_prompts=["", ""], options=OPTIONS)
    torch.testing.assert_close(away.image_embed, plain.image_embed, rtol=1e-5, atol=1e-5)
    assert np.abs(away.images[LARGE].astype(int) - plain.images[LARGE]).max() <= 1


def test_the_loader_does_what_diffusers_own_does_not(exported: Path) -> None:
    """Once theirs loads the folder, `load_pipeline.py` has no reason to be."""
    with pytest.raises(ValueError, match=r"unclip|UnCLIPTextProjModel"):
        UnCLIPPipeline.from_pretrained(exported)
    assert isinstance(load(exported), UnCLIPPipeline)


def test_the_stages_are_karlos(bundle: Path) -> None:
    configs = Bundle.load(str(bundle)).configs
    assert configs["upsampler_256"].model.last_step
    assert not configs["decoder"].unit_norm
    assert configs["decoder"].sampling.num_inference_steps == 25
    assert configs["prior"].diffusion.clip_sample_range == 5.0
