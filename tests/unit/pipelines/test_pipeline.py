from __future__ import annotations

import json
import shutil
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from unclip.config.base import ConfigError
from unclip.models.decoder import DecoderCondition
from unclip.pipelines.bundle import Bundle, BundleError, save_stage
from unclip.pipelines.cascade import CascadeOutput, GenerationOptions, plan_cascade
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStage, StageConfig, stage_config_from_dict
from unclip.utils.random import SampleGenerator

PROMPTS, SEEDS = ["a red circle", "a blue heart", "a woman firefighter"], [7, 8, 7]
AR_PRIOR = {
    "kind": "prior",
    "prior_type": "autoregressive",
    "model": {
        "embed_dim": 8,
        "context_length": 16,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "num_components": 4,
        "num_buckets": 16,
    },
}
ADM = {
    "model": {"embed_dim": None, "text": None, "num_classes": 3},
    "label_column": "kind",
    "classes": ["cat", "dog", "owl"],
}
STATES = {
    "model": {"embed_dim": None, "text": None, "text_states": {"context_length": 16, "state_dim": 16, "width": 8}}
}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: str) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def output(pipeline: Pipeline) -> CascadeOutput:
    return pipeline(PROMPTS, SEEDS)


def options(**changes: object) -> GenerationOptions:
    return GenerationOptions().merged(changes)


def test_every_size_comes_as_8_bit_pictures(output: CascadeOutput) -> None:
    assert {size: picture.shape for size, picture in output.images.items()} == {
        16: (3, 16, 16, 3),
        32: (3, 32, 32, 3),
        64: (3, 64, 64, 3),
    }
    assert all(picture.dtype == np.uint8 and picture.std() > 1 for picture in output.images.values())
    torch.testing.assert_close(output.image_embed.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_picture_does_not_depend_on_its_batch(pipeline: Pipeline, output: CascadeOutput, index: int) -> None:
    alone = pipeline([PROMPTS[index]], [SEEDS[index]])
    torch.testing.assert_close(alone.image_embed[0], output.image_embed[index], rtol=1e-4, atol=1e-5)
    for size, pictures in alone.images.items():
        difference = np.abs(pictures[0].astype(int) - output.images[size][index].astype(int))
        assert difference.max() <= 2, size  # rounding to 8 bits, and what the next stages make of it


def test_a_picture_does_not_depend_on_micro_batches(pipeline: Pipeline, output: CascadeOutput) -> None:
    split = pipeline(PROMPTS, SEEDS, options=options(max_pixels=1))
    for size, pictures in split.images.items():
        assert np.abs(pictures.astype(int) - output.images[size].astype(int)).max() <= 2


def test_seed_and_prompt_both_matter(pipeline: Pipeline) -> None:
    images = pipeline(["a dog", "a dog", "a cat"], [1, 2, 1], options=options(up_to=16)).images[16].astype(int)
    assert np.abs(images[0] - images[1]).mean() > 1
    assert np.abs(images[0] - images[2]).max() > 0


def test_the_next_stage_sees_the_8_bit_picture(pipeline: Pipeline, output: CascadeOutput) -> None:
    stage = pipeline.upsamplers["upsampler_256"]
    streams = SampleGenerator.for_samples(0, torch.tensor(SEEDS)).child("upsampler_256")
    low_res = to_signed(torch.from_numpy(output.images[16]))
    expected = to_uint8(stage.sample(low_res, streams, sampling=stage.config.sampling))
    np.testing.assert_array_equal(output.images[32], expected.numpy())


def test_options_change_the_stage_they_name(pipeline: Pipeline, output: CascadeOutput) -> None:
    changed = pipeline(PROMPTS, SEEDS, options=options(decoder={"guidance_scale": 5.0}, up_to=32))
    torch.testing.assert_close(changed.image_embed, output.image_embed)
    assert np.abs(changed.images[16].astype(int) - output.images[16].astype(int)).max() > 2
    assert set(changed.images) == {16, 32}


def test_the_prior_is_steered_by_its_own_guidance(pipeline: Pipeline, output: CascadeOutput) -> None:
    changed = pipeline(PROMPTS, SEEDS, options=options(prior={"guidance_scale": 5.0}, up_to=16))
    assert (changed.image_embed - output.image_embed).abs().max() > 1e-3


def test_progress_ends_at_its_total_in_every_stage(pipeline: Pipeline) -> None:
    calls: list[tuple[str, int, int]] = []
    pipeline(
        PROMPTS,
        SEEDS,
        options=options(max_pixels=2 * 32 * 32, upsampler_1024={"num_inference_steps": 1}),
        progress=lambda *call: calls.append(call),
    )
    expected = {"prior": 3, "decoder": 3, "upsampler_256": 2 * 2, "upsampler_1024": 3}
    assert calls == [(stage, done, total) for stage, total in expected.items() for done in range(1, total + 1)]


def test_bfloat16_stays_near_float32(tiny_bundle: str, output: CascadeOutput) -> None:
    half = Pipeline.from_bundle(tiny_bundle, dtype=torch.bfloat16)(PROMPTS, SEEDS)
    assert (half.image_embed * output.image_embed).sum(dim=1).min() > 0.99
    assert np.abs(half.images[16].astype(int) - output.images[16].astype(int)).mean() < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up_to": 48}, "up_to = 48.*16, 32, 64"),
        ({"up_to": 8}, "up_to = 8"),
        ({"prior": {"num_inference_steps": 51}}, "options.prior.*51"),
        ({"upsampler_256": {"timestep_spacing": "fast27"}}, "options.upsampler_256.*fast27"),
        ({"upsampler_256": {"timesteps_list": [50, 3]}}, r"options.upsampler_256.*0\.\.49, not \[50, 3\]"),
        ({"decoder": {"timesteps_list": [9, 3], "num_inference_steps": 5}}, "options.decoder.*has 2 timesteps"),
        ({"upsampler_256": {"guidance_scale": 2.0}}, "upsampler_256.guidance_scale: unknown field"),
    ],
)
def test_options_that_do_not_suit_are_refused(
    tiny_configs: Mapping[str, StageConfig], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_cascade(tiny_configs, options(**changes))  # type: ignore[arg-type]


def test_a_chain_with_a_gap_is_refused_unless_it_is_not_needed(tiny_configs: Mapping[str, StageConfig]) -> None:
    gap = {name: config for name, config in tiny_configs.items() if name != "upsampler_256"}
    with pytest.raises(BundleError, match=r"upsampler_1024.*32 pixels.*16"):
        plan_cascade(gap, GenerationOptions())  # type: ignore[arg-type]
    assert list(plan_cascade(gap, options(up_to=16)).sizes.values()) == [16]  # type: ignore[arg-type]


def test_stages_that_a_decoder_needs_are_named(tiny_configs: Mapping[str, StageConfig]) -> None:
    with pytest.raises(BundleError, match=r"needs the stage prior; the bundle has decoder"):
        plan_cascade({"decoder": tiny_configs["decoder"]}, GenerationOptions())
    with pytest.raises(BundleError, match=r"need the stage decoder; the bundle has prior"):
        plan_cascade({"prior": tiny_configs["prior"]}, GenerationOptions())
    told = tiny_configs["decoder"].merged(ADM | {"model": {**ADM["model"], "embed_dim": 8}})
    with pytest.raises(BundleError, match=r"is told label, which a prompt does not say"):
        plan_cascade({**tiny_configs, "decoder": told}, GenerationOptions())  # type: ignore[arg-type]
    decoder_alone = Pipeline(DecoderStage(tiny_configs["decoder"], nn.Linear(1, 1)))  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="needs the stage prior; the bundle has decoder"):
        decoder_alone(["a dog"], [1])
    with pytest.raises(ConfigError, match="needs a CLIP; this pipeline has none"):
        decoder_alone.encode_text(["a dog"])
    with pytest.raises(ConfigError, match="needs a prior; this pipeline has none"):
        decoder_alone.draw([1]).prior(["a dog"])


# --- decoders that are told no image embedding ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["glide", "adm", "states"])
def forerunner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bundle: str) -> str:
    """A bundle of that decoder and the upsamplers without a prior, and without a CLIP but for the one told its states."""
    uri = str(tmp_path_factory.mktemp(request.param) / "bundle")
    full = Bundle.load(tiny_bundle)
    changes = {"glide": {"model": {"embed_dim": None}}, "adm": ADM, "states": STATES}[request.param]
    decoder = full.configs["decoder"].merged(changes)
    torch.manual_seed(0)
    network = decoder.build()
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    clip = full.clip if decoder.in_clip_space else None
    save_stage(uri, decoder, tensors=network.state_dict(), clip=clip, provenance={})
    for name in ("upsampler_256", "upsampler_1024", *(["clip"] if clip else [])):
        tensors = full.load_model(name).state_dict()  # type: ignore[arg-type]
        reference = full.manifests[name].clip  # type: ignore[index]
        save_stage(uri, full.configs[name], tensors=tensors, clip=reference, provenance={})  # type: ignore[index]
    return uri


def test_decoders_without_a_prior_make_pictures_of_prompts(forerunner: str) -> None:
    """Of captions, of CLIP's states of them, or of the names of classes: through the same cascade, with guidance."""
    pipeline = Pipeline.from_bundle(forerunner)
    prompts = list(ADM["classes"])
    output = pipeline(prompts, [7, 7, 7])
    assert output.image_embed is None
    assert {size: picture.shape for size, picture in output.images.items()} == {
        size: (3, size, size, 3) for size in (16, 32, 64)
    }
    first, *others = output.images[16].astype(int)
    assert all(np.abs(first - other).max() > 2 for other in others)  # the prompt is all that they differ in
    alone = pipeline(prompts[1:2], [7], options=options(up_to=16))
    assert np.abs(alone.images[16][0].astype(int) - output.images[16][1].astype(int)).max() <= 2
    # Not with ddpm, whose learned variance is that of the conditional half.
    ignored = options(decoder={"guidance_scale": 0.0, "sampler": "ddim"}, up_to=16)
    unguided = pipeline(prompts, [7, 7, 7], options=ignored)
    assert np.abs(unguided.images[16][0].astype(int) - unguided.images[16][1].astype(int)).max() <= 1
    assert set(pipeline(prompts, [1, 2, 3], options=options(up_to=32)).images) == {16, 32}


class Asked(nn.Module):
    """A decoder's network that keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def prepare(self, cond: DecoderCondition) -> DecoderCondition:
        self.cond = cond
        return cond

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: DecoderCondition) -> torch.Tensor:
        return torch.cat([x_t, x_t], dim=1)


def test_a_class_is_the_one_that_the_prompt_names(tiny_configs: Mapping[str, StageConfig]) -> None:
    decoder = tiny_configs["decoder"].merged(ADM)
    stage = DecoderStage(decoder, Asked())
    pipeline = Pipeline(stage, upsamplers={})
    unguided = options(decoder={"guidance_scale": 1.0})
    pipeline(["owl", "cat", "owl"], [1, 2, 3], options=unguided)
    assert stage.network.cond.label.label.tolist() == [2, 0, 2]
    with pytest.raises(ConfigError, match=r"prompt = 'cats': none of the 3 classes; did you mean 'cat'\?"):
        pipeline(["owl", "cats"], [1, 2], options=unguided)


def test_seeds_are_checked(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"2 seeds for 1 prompts"):
        pipeline(["a dog"], [1, 2])
    with pytest.raises(ValueError, match=str(2**63)):
        pipeline(["a dog"], [2**63])


def test_chosen_steps_replace_a_stored_list_of_timesteps(tiny_configs: Mapping[str, StageConfig]) -> None:
    stored = {"sampling": {"num_inference_steps": 3, "timesteps_list": [49, 20, 0]}}
    configs = {**tiny_configs, "decoder": tiny_configs["decoder"].merged(stored)}
    as_stored = plan_cascade(configs, GenerationOptions()).sampling["decoder"]  # type: ignore[arg-type]
    assert as_stored.timesteps(50) == [49, 20, 0]  # type: ignore[union-attr]
    chosen = plan_cascade(configs, options(decoder={"num_inference_steps": 2})).sampling["decoder"]  # type: ignore[arg-type]
    assert chosen.timesteps(50) == [49, 0]  # type: ignore[union-attr]
    listed = plan_cascade(configs, options(decoder={"timesteps_list": [40, 5]})).sampling["decoder"]  # type: ignore[arg-type]
    assert listed.timesteps(50) == [40, 5]  # type: ignore[union-attr]


def test_an_interval_of_guidance_can_be_chosen(pipeline: Pipeline, output: CascadeOutput) -> None:
    """Guidance in no timestep that is visited is no guidance."""
    nowhere = pipeline(PROMPTS, SEEDS, options=options(decoder={"guidance_interval": [0.1, 0.2]}, up_to=16))
    off = pipeline(PROMPTS, SEEDS, options=options(decoder={"guidance_scale": 1.0}, up_to=16))
    assert np.abs(nowhere.images[16].astype(int) - off.images[16].astype(int)).max() <= 1
    assert np.abs(nowhere.images[16].astype(int) - output.images[16].astype(int)).max() > 2


def test_settings_are_plain_values_and_follow_the_options(tiny_configs: Mapping[str, StageConfig]) -> None:
    plain, changed = (
        plan_cascade(tiny_configs, options(**changes)).settings  # type: ignore[arg-type]
        for changes in ({}, {"decoder": {"eta": 0.5, "sampler": "ddim"}})
    )
    assert json.loads(json.dumps(plain)) == plain
    assert changed["sampling"]["decoder"]["eta"] == 0.5
    assert changed["sampling"]["prior"] == plain["sampling"]["prior"]


@pytest.fixture(scope="module")
def ar_bundle(tiny_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same bundle with an autoregressive prior."""
    uri = str(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("ar") / "bundle"))
    stage = stage_config_from_dict(AR_PRIOR)
    torch.manual_seed(0)
    clip = Bundle.load(uri).manifests["decoder"].clip
    save_stage(uri, stage, tensors=stage.build().state_dict(), clip=clip, provenance={})
    return uri


def test_either_prior_can_stand_in_the_cascade(ar_bundle: str, output: CascadeOutput) -> None:
    pipeline = Pipeline.from_bundle(ar_bundle)
    images = pipeline(PROMPTS, SEEDS, options=options(up_to=16))
    assert images.images[16].shape == output.images[16].shape
    torch.testing.assert_close(images.image_embed.norm(dim=1), torch.ones(3))
    alone = pipeline(PROMPTS[:1], SEEDS[:1], options=options(up_to=16))
    torch.testing.assert_close(alone.image_embed[0], images.image_embed[0], rtol=1e-4, atol=1e-5)


def test_each_prior_has_options_of_its_own(ar_bundle: str, tiny_configs: Mapping[str, StageConfig]) -> None:
    configs = Bundle.load(ar_bundle).configs
    sampling = plan_cascade(configs, options(prior={"temperature": 0.5})).sampling["prior"]
    assert sampling.temperature == 0.5  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"options.prior: num_inference_steps: unknown field"):
        plan_cascade(configs, options(prior={"num_inference_steps": 3}))
    with pytest.raises(ConfigError, match=r"options.prior: temperature: unknown field"):
        plan_cascade(tiny_configs, options(prior={"temperature": 0.5}))  # type: ignore[arg-type]


def test_text_states_are_those_of_the_bundles_clip(tiny_bundle: str, tiny_configs: Mapping[str, StageConfig]) -> None:
    clip = Bundle.load(tiny_bundle).load_clip()
    decoder = tiny_configs["decoder"].merged(STATES)
    stage = DecoderStage(decoder, Asked())
    Pipeline(stage, clip=clip, upsamplers={})(PROMPTS, SEEDS, options=options(decoder={"guidance_scale": 1.0}))
    text = stage.network.cond.text
    torch.testing.assert_close(text.states, clip.encode_text_states(clip.tokenize(PROMPTS))[1])
    assert text.mask.sum(dim=1).tolist() == [5, 5, 5]
    other = decoder.merged({"model": {"text_states": {"context_length": 12}}})
    with pytest.raises(ValueError, match="takes the states of 12 tokens; its CLIP has 16"):
        Pipeline(DecoderStage(other, Asked()), clip=clip, upsamplers={})
