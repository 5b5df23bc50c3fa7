"""Guides against finite differences and Bayes' rule, in the sampler with a trained classifier, and out of a bundle."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.squares import COLOURS, coloured_squares, trained_classifier
from tests.support.squares import STAGE as SQUARES
from torch import nn
from torch.nn import functional

from unclip.config.base import ConfigError
from unclip.diffusion.process import DiffusionConfig, DiffusionProcess
from unclip.diffusion.samplers import SamplingConfig
from unclip.pipelines.bundle import Bundle, BundleError, save_stage
from unclip.pipelines.cascade import CascadeOutput, GenerationOptions, plan_cascade
from unclip.pipelines.guides import GuideOptions, build_guide, check_guides, combined_guide
from unclip.pipelines.pictures import to_signed
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import DecoderStageConfig, StageConfig, stage_config_from_dict
from unclip.recipes import RECIPES
from unclip.utils.random import SampleGenerator

PROCESS = {"num_train_timesteps": 50}
TEXT = {"context_length": 12, "width": 16, "depth": 1, "heads": 2}
GUIDES: dict[str, dict[str, Any]] = {
    "noised_clip": {
        "kind": "noised_clip",
        "model": {
            "embed_dim": 8,
            "image_size": 16,
            "patch_size": 4,
            "width": 16,
            "depth": 1,
            "heads": 2,
            "text": TEXT,
        },
        "diffusion": PROCESS,
    },
    "classifier": {
        "kind": "classifier",
        "model": {"encoder": {"channels": 8, "channel_mult": [1, 2], "depth": 1, "head_channels": 8, "image_size": 16}},
        "diffusion": PROCESS,
        "label_column": "colour",
        "classes": COLOURS,
    },
}
PROMPTS, SEEDS = ["a red circle", "a blue heart", "a woman firefighter"], [7, 8, 7]
ON: dict[str, dict[str, Any]] = {
    "noised_clip": {"clip_guidance_scale": 30.0},
    "classifier": {"classifier_guidance_scale": 30.0, "class_label": "blue"},
}


@pytest.fixture(scope="module")
def configs(tiny_configs: Mapping[str, StageConfig]) -> dict[Any, StageConfig]:
    return {**tiny_configs, **{name: stage_config_from_dict(config) for name, config in GUIDES.items()}}


@pytest.fixture(scope="module")
def models(configs: dict[Any, StageConfig]) -> dict[str, nn.Module]:
    """The guides' networks, with weights that are nowhere zero."""
    torch.manual_seed(1)
    built = {}
    for name in GUIDES:
        built[name] = configs[name].build().eval().requires_grad_(False)
        for parameter in built[name].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


@pytest.fixture(scope="module")
def bundle(
    tiny_bundle: str,
    tmp_path_factory: pytest.TempPathFactory,
    configs: dict[Any, StageConfig],
    models: dict[str, nn.Module],
) -> str:
    uri = str(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("guided") / "bundle"))
    for name, model in models.items():
        save_stage(uri, configs[name], tensors=model.state_dict(), clip=None, provenance={})
    return uri


def decoder_options(*names: str) -> GenerationOptions:
    changes = {key: value for name in names for key, value in ON[name].items()}
    return GenerationOptions().merged({"decoder": changes, "up_to": 16})


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUIDES)
def test_gradients_are_those_of_finite_differences(
    name: str, configs: dict[Any, StageConfig], models: dict[str, nn.Module]
) -> None:
    """Central differences along random directions, in float64."""
    guide = build_guide(configs[name], copy.deepcopy(models[name]).double())
    options = GuideOptions.from_dict(ON[name])
    log_probability = guide.log_probability(guide.target(PROMPTS, options))
    random = torch.Generator().manual_seed(0)
    x_t = torch.randn(3, 3, 16, 16, generator=random, dtype=torch.float64)
    direction = torch.randn(x_t.shape, generator=random, dtype=torch.float64)
    timesteps = torch.tensor([0, 20, 49])
    leaf = x_t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_probability(leaf, timesteps, None).sum(), leaf)
    step = 1e-5
    above, below = (log_probability(x_t + sign * step * direction, timesteps, None) for sign in (1, -1))
    torch.testing.assert_close(
        (gradient * direction).sum(dim=(1, 2, 3)), (above - below) / (2 * step), rtol=1e-6, atol=1e-8
    )


def test_clip_guidance_is_the_scaled_cosine(configs: dict[Any, StageConfig], models: dict[str, nn.Module]) -> None:
    """GLIDE, section 2.4: f(x_t) . g(c), with the scale of the logits as in its released code."""
    model: Any = models["noised_clip"]
    guide = build_guide(configs["noised_clip"], model)
    target = guide.target(PROMPTS, GuideOptions())
    x_t, timesteps = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 20, 49])
    cosine = functional.cosine_similarity(model.picture_tower(x_t, timesteps), target)
    torch.testing.assert_close(guide.log_probability(target)(x_t, timesteps, None), model.log_scale.exp() * cosine)
    torch.testing.assert_close(guide.target(PROMPTS[1:2], GuideOptions())[0], target[1])


def test_classifier_guidance_is_the_log_probability_of_the_class(
    configs: dict[Any, StageConfig], models: dict[str, nn.Module]
) -> None:
    guide = build_guide(configs["classifier"], models["classifier"])
    x_t, timesteps = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 20, 49])
    total = torch.zeros(3)
    for position, label in enumerate(COLOURS):
        target = guide.target(PROMPTS, GuideOptions(classifier_guidance_scale=1.0, class_label=label))
        assert target.tolist() == [position] * 3
        total += guide.log_probability(target)(x_t, timesteps, None).exp()
    torch.testing.assert_close(total, torch.ones(3))


# --- steering ---------------------------------------------------------------------------------------------------------

CENTRES, SPREAD = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], dtype=torch.float64), 0.3


def class_log_density(process: DiffusionProcess, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """(B, 3): log q(x_t | y) up to a constant, where the data of class y are N(CENTRES[y], SPREAD^2 I)."""
    abar = process.alphas_cumprod(timesteps)[:, None]
    distance = (x_t[:, None] - abar.sqrt()[..., None] * CENTRES).square().sum(dim=2)
    return -distance / (2 * (abar * SPREAD**2 + 1 - abar)) - (abar * SPREAD**2 + 1 - abar).log()


def exact_noise(
    process: DiffusionProcess, x_t: torch.Tensor, timesteps: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """-sqrt(1 - abar) times the score of a mixture of the classes; `weights` (B, 3) are the posteriors of the classes."""
    abar = process.alphas_cumprod(timesteps)[:, None]
    scores = (abar.sqrt()[..., None] * CENTRES - x_t[:, None]) / (abar * SPREAD**2 + 1 - abar)[..., None]
    return -(1 - abar).sqrt() * (weights[..., None] * scores).sum(dim=1)


@pytest.mark.parametrize("timestep", [0, 30, 99])
def test_an_exact_classifier_turns_the_mixture_into_its_class(timestep: int) -> None:
    """Bayes: score of q(x_t) + gradient of log q(y | x_t) = score of q(x_t | y)."""
    process = DiffusionConfig(num_train_timesteps=100).build()
    label, timesteps = torch.tensor([0, 1, 2, 2]), torch.full((4,), timestep)
    x_t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        return exact_noise(process, x_t, timesteps, class_log_density(process, x_t, timesteps).softmax(dim=1))

    def log_probability(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        return class_log_density(process, x_t, timesteps).log_softmax(dim=1).gather(1, label[:, None])[:, 0]

    # Halves of the same log probability: scales multiply, terms add up.
    guide = combined_guide([(0.5, log_probability), (0.5, log_probability)], process)
    expected = exact_noise(process, x_t, timesteps, functional.one_hot(label, 3).double())
    torch.testing.assert_close(guide(denoise)(x_t, timesteps, None), expected)


def test_a_trained_classifier_steers_an_unconditional_model_to_its_class() -> None:
    """The model is the exact denoiser of 90 pictures, 30 of each colour, and knows no labels."""
    model, config = trained_classifier(), stage_config_from_dict(SQUARES | {"kind": "classifier"})
    process = config.diffusion.build()  # type: ignore[union-attr]
    pictures, label = coloured_squares(600, seed=3)
    kept = torch.cat([(label == colour).nonzero()[:30, 0] for colour in range(3)])
    data = to_signed(pictures[kept]).contiguous()

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
        abar = process.alphas_cumprod(timesteps)[:, None].float()
        distance = (x_t.flatten(1)[:, None] - abar.sqrt()[..., None] * data.flatten(1)).square().sum(dim=2)
        x_start = (-distance / (2 * (1 - abar))).softmax(dim=1) @ data.flatten(1)
        return process.pred_noise(x_start.view_as(x_t), x_t, timesteps)

    guide, count = build_guide(config, model), 30
    streams = SampleGenerator.for_samples(0, torch.arange(count))
    x_T = streams.normal((3, 8, 8))
    sampling = SamplingConfig(sampler="ddim", num_inference_steps=25)
    options = GuideOptions(classifier_guidance_scale=3.0, class_label="green")
    log_probability = guide.log_probability(guide.target(["any"] * count, options))
    shares = {}
    for name, steered in (("free", None), ("guided", combined_guide([(3.0, log_probability)], process))):
        samples = sampling.sample(denoise, x_T, process, streams, cond=None, guide=steered)  # type: ignore[type-var]
        colour = (samples > 0.5).float().sum(dim=(2, 3)).argmax(dim=1)
        shares[name] = float((colour == COLOURS.index("green")).float().mean())
    assert shares["free"] < 0.6
    assert shares["guided"] > 0.9


# --- out of a bundle --------------------------------------------------------------------------------------------------


def test_guides_survive_a_bundle_and_belong_to_no_clip(
    bundle: str, configs: dict[Any, StageConfig], models: dict[str, nn.Module]
) -> None:
    loaded = Bundle.load(bundle)
    assert list(loaded.configs)[:3] == ["clip", "noised_clip", "classifier"]
    for name, model in models.items():
        assert loaded.configs[name] == configs[name]  # type: ignore[index]
        assert loaded.manifests[name].clip is None  # type: ignore[index]
        found = loaded.load_model(name).state_dict()  # type: ignore[arg-type]
        assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert loaded.load_clip().fingerprint == loaded.manifests["prior"].clip.fingerprint  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def plain(bundle: str) -> CascadeOutput:
    return Pipeline.from_bundle(bundle)(PROMPTS, SEEDS, options=decoder_options())


@pytest.mark.parametrize("names", [("noised_clip",), ("classifier",), ("noised_clip", "classifier")])
def test_guides_change_the_decoders_pictures_alone(bundle: str, plain: CascadeOutput, names: tuple[str, ...]) -> None:
    options = decoder_options(*names)
    pipeline = Pipeline.from_bundle(bundle, options=options)
    assert set(pipeline.guides) == set(names)
    output = pipeline(PROMPTS, SEEDS, options=options)
    torch.testing.assert_close(output.image_embed, plain.image_embed)
    difference = np.abs(output.images[16].astype(int) - plain.images[16].astype(int))
    assert (difference.max(axis=(1, 2, 3)) > 4).all()
    split = pipeline(PROMPTS, SEEDS, options=options.merged({"max_pixels": 1}))
    assert np.abs(split.images[16].astype(int) - output.images[16].astype(int)).max() <= 2
    again = pipeline(PROMPTS, SEEDS, options=decoder_options())
    np.testing.assert_array_equal(again.images[16], plain.images[16])


def test_guided_pictures_are_more_probable_to_their_guide(bundle: str, plain: CascadeOutput) -> None:
    """What the gradient is of: it rises for every picture."""
    options = decoder_options("classifier")
    pipeline = Pipeline.from_bundle(bundle, options=options)
    guided = pipeline(PROMPTS, SEEDS, options=options)
    guide = pipeline.guides["classifier"]
    log_probability = guide.log_probability(guide.target(PROMPTS, options.decoder.guidance))
    scores = [
        log_probability(to_signed(torch.from_numpy(output.images[16])), torch.zeros(3, dtype=torch.int64), None)
        for output in (plain, guided)
    ]
    assert (scores[1] > scores[0]).all()


def test_bfloat16_guides_stay_near_float32(bundle: str) -> None:
    options = decoder_options("noised_clip", "classifier")
    outputs = [
        Pipeline.from_bundle(bundle, options=options, dtype=dtype)(PROMPTS, SEEDS, options=options)
        .images[16]
        .astype(int)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert np.abs(outputs[0] - outputs[1]).mean() < 3


def test_no_guide_is_loaded_unless_asked_for(bundle: str) -> None:
    assert Pipeline.from_bundle(bundle).guides == {}


def test_what_a_picture_was_made_with_names_its_guides(configs: dict[Any, StageConfig]) -> None:
    plain, guided = (plan_cascade(configs, decoder_options(*names)) for names in ((), ("classifier",)))
    assert plain.settings != guided.settings
    assert guided.settings["guidance"]["class_label"] == "blue"
    assert plan_cascade(configs, decoder_options("noised_clip")).context_length == 12
    assert plain.context_length == 16


# --- refusals ---------------------------------------------------------------------------------------------------------


def changed(config: StageConfig, **changes: Any) -> StageConfig:
    return config.merged(changes)


@pytest.mark.parametrize("name", GUIDES)
def test_a_bundle_without_the_guide_is_refused(name: str, tiny_configs: dict[Any, StageConfig]) -> None:
    field = next(iter(ON[name]))
    with pytest.raises(
        BundleError, match=f"options.decoder.{field} = 30.0: needs the stage {name}; the bundle has clip, "
    ):
        plan_cascade(tiny_configs, decoder_options(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion": {"num_train_timesteps": 60}}, r"noise of .*'num_train_timesteps': 60.* decoder's .* 50"),
        ({"diffusion": {"beta_schedule": "linear"}}, r"noise of .*'linear'.* decoder's .*'squaredcos_cap_v2'"),
        ({"model": {"image_size": 32}}, "knows pictures of 32 pixels, but the decoder makes 16"),
    ],
)
def test_a_guide_of_other_pictures_is_refused(
    configs: dict[Any, StageConfig], changes: dict[str, Any], message: str
) -> None:
    other = {**configs, "noised_clip": changed(configs["noised_clip"], **changes)}
    with pytest.raises(BundleError, match=message):
        plan_cascade(other, decoder_options("noised_clip"))
    plan_cascade(other, decoder_options("classifier"))  # what is not used may be anything


def test_what_the_decoder_predicts_does_not_matter(configs: dict[Any, StageConfig]) -> None:
    """Only the noise has to be the same."""
    other = changed(
        configs["noised_clip"], diffusion={"prediction_type": "v_prediction", "variance_type": "fixed_large"}
    )
    plan_cascade({**configs, "noised_clip": other}, decoder_options("noised_clip"))


def test_an_unknown_class_is_refused(configs: dict[Any, StageConfig]) -> None:
    options = decoder_options("classifier").merged({"decoder": {"class_label": "grene"}})
    with pytest.raises(ConfigError, match=r"class_label = 'grene': none of the 3 classes; did you mean 'green'"):
        plan_cascade(configs, options)
    options = options.merged({"decoder": {"class_label": "7"}})
    with pytest.raises(ConfigError, match=r"they are red, green, blue"):
        plan_cascade(configs, options)


@pytest.mark.parametrize(
    "changes",
    [{"class_label": "red"}, {"classifier_guidance_scale": 2.0}, {"clip_guidance_scale": -1.0}],
)
def test_halves_of_a_request_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        GenerationOptions().merged({"decoder": changes})


@pytest.mark.parametrize("recipe", ["debug", "demo", "small", "paper"])
def test_guides_of_a_recipe_fit_its_decoder(recipe: str) -> None:
    configs: dict[Any, StageConfig] = {
        name: RECIPES[name][recipe]().objective.stage_config()  # type: ignore[index]
        for name in ("noised_clip", "classifier", "decoder")
    }
    configs["classifier"] = changed(configs["classifier"], classes=["a", "b"])
    options = GuideOptions(clip_guidance_scale=1.0, classifier_guidance_scale=1.0, class_label="a")
    assert isinstance(configs["decoder"], DecoderStageConfig)
    check_guides(configs, configs["decoder"], options)
