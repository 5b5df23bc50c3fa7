"""Probes: a network that computes something else than where it was saved is found, one that only rounds otherwise is not."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.engines import randomized
from torch import nn

from unclip.pipelines.bundle import Bundle, BundleError, ClipReference, save_stage
from unclip.pipelines.probe import check_probe
from unclip.pipelines.stages import StageConfig, stage_config_from_dict

TEXT = {"context_length": 12, "width": 16, "depth": 1, "heads": 2}
ENCODER = {"channels": 8, "channel_mult": [1, 2], "depth": 1, "head_channels": 8, "image_size": 16}
FURTHER: dict[str, dict[str, Any]] = {
    "ar_prior": {
        "kind": "prior",
        "prior_type": "autoregressive",
        "model": {"embed_dim": 8, "context_length": 16, "width": 16, "depth": 1, "heads": 2, "num_components": 5},
    },
    "noised_clip": {
        "kind": "noised_clip",
        "model": {"embed_dim": 8, "image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "text": TEXT},
        "diffusion": {"num_train_timesteps": 50},
    },
    "classifier": {
        "kind": "classifier",
        "model": {"encoder": {**ENCODER, "attention_resolutions": [8]}},
        "diffusion": {"num_train_timesteps": 50},
        "label_column": "colour",
        "classes": ["red", "green", "blue"],
    },
}
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "states": (
        "decoder",
        {"model": {"text": None, "text_states": {"context_length": 16, "state_dim": 16, "width": 8}}},
    ),
    "inpainting": ("decoder", {"model": {"inpainting": True, "unet": {"in_channels": 7}}}),
    "adm": (
        "decoder",
        {
            "model": {"embed_dim": None, "text": None, "num_classes": 3},
            "label_column": "kind",
            "classes": ["cat", "dog", "owl"],
        },
    ),
    "noise level": ("upsampler_256", {"model": {"noise_conditioning": True}}),
}
KINDS = ("clip", "prior", "decoder", "upsampler_256", *FURTHER, *CHANGED)

WITHOUT_EFFECT = {
    "clip.logit_scale",  # read in training alone
    "clip.visual.proj",  # unit norm is restored behind these
    "clip.text_projection",
    "picture_tower.projection.weight",
    "caption_tower.projection.weight",
}
CPU = torch.device("cpu")


@pytest.fixture(params=KINDS)
def saved(request: pytest.FixtureRequest, tiny_configs: Mapping[str, StageConfig], tmp_path: Path) -> Bundle:
    """A stage of each kind, saved alone."""
    kind = request.param
    if kind in FURTHER:
        config = stage_config_from_dict(FURTHER[kind])
    elif kind in CHANGED:
        of, changes = CHANGED[kind]
        config = tiny_configs[of].merged(changes)
    else:
        config = tiny_configs[kind]
    clip = ClipReference(source="clip", fingerprint="0") if config.in_clip_space else None
    tensors = randomized(config).state_dict()
    if kind == "ar_prior":
        tensors["codec.mean"].fill_(0.1)
    save_stage(str(tmp_path / "bundle"), config, tensors=tensors, clip=clip, provenance={})
    return Bundle.load(str(tmp_path / "bundle"))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(bundle: Bundle, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    (name,) = bundle.configs
    check_probe(bundle, name, model, device=CPU, dtype=dtype)


def loaded(bundle: Bundle) -> nn.Module:
    (name,) = bundle.configs
    return bundle.load_model(name)


@pytest.mark.usefixtures("threads")
def test_other_threads_layouts_and_precisions_round_and_no_more(saved: Bundle) -> None:
    model = loaded(saved)
    for count in (1, 2):
        torch.set_num_threads(count)
        check(saved, model)
    check(saved, model.to(memory_format=torch.channels_last))
    with torch.backends.mkldnn.flags(enabled=False):
        check(saved, model)
    if "clip" not in saved.configs:  # which stays in float32
        check(saved, model.to(torch.bfloat16), torch.bfloat16)


def test_a_tensor_that_is_scaled_is_found_whichever_it_is(saved: Bundle) -> None:
    model, passed = loaded(saved), set()
    for name, tensor in model.state_dict().items():
        kept = tensor.clone()
        tensor.mul_(1.1)
        try:
            check(saved, model)
            passed.add(name)
        except BundleError:
            pass
        tensor.copy_(kept)
    assert passed <= WITHOUT_EFFECT
    check(saved, model)


def test_tensors_that_are_swapped_are_found(saved: Bundle) -> None:
    model, passed = loaded(saved), list[tuple[str, str]]()
    tensors = model.state_dict()
    for one, other in itertools.pairwise(sorted(tensors, key=lambda name: (tensors[name].shape, name))):
        if tensors[one].shape != tensors[other].shape or torch.equal(tensors[one], tensors[other]):
            continue
        kept = tensors[one].clone(), tensors[other].clone()
        tensors[one].copy_(kept[1])
        tensors[other].copy_(kept[0])
        try:
            check(saved, model)
            passed.append((one, other))
        except BundleError:
            pass
        tensors[one].copy_(kept[0])
        tensors[other].copy_(kept[1])
    assert [pair for pair in passed if not _are_added(*pair)] == []


def _are_added(one: str, other: str) -> bool:
    """Whether two biases are added to the same, where nobody could tell which is which."""
    block, _, bias = one.rpartition("residual.")
    if bias == "conv_out.bias":
        return other == f"{block}residual.skip.bias"
    added = {"conditioners.image.to_time.bias", "conditioners.text.to_time.bias", "unet.time_embed.mlp.2.bias"}
    return {one, other} <= added


def test_the_error_names_stage_output_deviation_and_what_is_allowed(tiny_bundle: str) -> None:
    bundle = Bundle.load(tiny_bundle)
    model = bundle.load_model("decoder")
    model.state_dict()["unet.stem.weight"].mul_(1.1)
    message = r"stage 'decoder' does not compute .*: its (prediction|variance) is off by 0\.\d+ of .* 2e-05 is allowed in torch"
    with pytest.raises(BundleError, match=message):
        check_probe(bundle, "decoder", model, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_is_found(tiny_bundle: str, dtype: torch.dtype) -> None:
    bundle = Bundle.load(tiny_bundle)
    model = bundle.load_model("upsampler_256").to(dtype)
    model.state_dict()["unet.stem.weight"].fill_(torch.nan)
    with pytest.raises(BundleError, match="is off by inf"):
        check_probe(bundle, "upsampler_256", model, device="cpu", dtype=dtype)


def test_damage_that_is_more_than_rounding_is_found_in_bfloat16(tiny_bundle: str) -> None:
    bundle = Bundle.load(tiny_bundle)
    model = bundle.load_model("decoder").to(torch.bfloat16)
    check_probe(bundle, "decoder", model, device="cpu", dtype=torch.bfloat16)
    model.state_dict()["unet.stem.weight"].mul_(-1)
    with pytest.raises(BundleError, match=r"0.06 is allowed in torch.bfloat16 on cpu"):
        check_probe(bundle, "decoder", model, device="cpu", dtype=torch.bfloat16)


def test_another_stage_of_the_same_shape_is_found(tiny_bundle: str, tiny_configs: Mapping[str, StageConfig]) -> None:
    with pytest.raises(BundleError, match="stage 'prior' does not compute here"):
        check_probe(
            Bundle.load(tiny_bundle), "prior", randomized(tiny_configs["prior"]), device="cpu", dtype=torch.float32
        )


def test_stages_of_older_bundles_have_none(
    tiny_configs: Mapping[str, StageConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_configs["upsampler_256"]
    save_stage(str(tmp_path), config, tensors=randomized(config).state_dict(), clip=None, provenance={})
    path = tmp_path / "upsampler_256" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert len(manifest["probe"]["prediction"]) == 48
    del manifest["probe"]
    path.write_text(json.dumps(manifest))
    bundle = Bundle.load(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        check_probe(bundle, "upsampler_256", config.build(), device="cpu", dtype=torch.float32)
    assert "stage upsampler_256 has no probe" in caplog.text


def test_a_probe_of_other_outputs_is_refused(tiny_configs: Mapping[str, StageConfig], tmp_path: Path) -> None:
    config = tiny_configs["upsampler_256"]
    model = randomized(config)
    save_stage(str(tmp_path), config, tensors=model.state_dict(), clip=None, provenance={})
    path = tmp_path / "upsampler_256" / "manifest.json"
    for probe in ({}, {"prediction": [0.5]}, {"something": [0.0] * 48}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"probe": probe}))
        with pytest.raises(BundleError, match="stage 'upsampler_256' has a probe of other outputs"):
            check_probe(Bundle.load(str(tmp_path)), "upsampler_256", model, device="cpu", dtype=torch.float32)


def test_weights_that_compute_no_numbers_are_not_saved(tiny_configs: Mapping[str, StageConfig], tmp_path: Path) -> None:
    config = tiny_configs["decoder"]
    state = randomized(config).state_dict()
    state["unet.stem.bias"][0] = torch.inf
    clip = ClipReference(source="clip", fingerprint="0")
    with pytest.raises(BundleError, match="its network's output prediction, variance is not finite"):
        save_stage(str(tmp_path / "bundle"), config, tensors=state, clip=clip, provenance={})
    assert not (tmp_path / "bundle" / "decoder").exists()
