"""UnCLIP folders in and out: bit-equal round trips, accounts of every tensor, refusals that name the field."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.engines import assert_same_pictures, run
from tests.support.karlo import make_karlo

from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request
from unclip.generation.engine.route import Stages
from unclip.interop.base import Source
from unclip.interop.convert import ConvertConfig, run_convert
from unclip.interop.diffusers.exporting import check_exportable, export_bundle
from unclip.interop.diffusers.importing import import_folder
from unclip.interop.keys import InteropError
from unclip.pipelines.bundle import Bundle, BundleError, save_stage
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import stage_config_from_dict

NETWORKS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last", "text_encoder", "image_encoder")
AR_PRIOR = {
    "kind": "prior",
    "prior_type": "autoregressive",
    "model": {"embed_dim": 16, "context_length": 12, "width": 8, "depth": 1, "heads": 1, "num_components": 4},
}
GONE = object()
SCHEDULERS = ("prior_scheduler", "decoder_scheduler", "super_res_scheduler")


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


def settings(folder: Path, part: str) -> dict[str, Any]:
    (path,) = [path for path in (folder / part).glob("*.json") if "config" in path.name]
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if not name.startswith("_")}


def copied(source: Path, target: Path) -> Path:
    """The folder again; its weights are links, to be unlinked before others take their place."""

    def copy(file: str, copy: str) -> None:
        os.symlink(file, copy) if file.endswith(".safetensors") else shutil.copy(file, copy)

    return Path(shutil.copytree(source, target, copy_function=copy))


def convert(**fields: str) -> None:
    list(run_convert(ConvertConfig(**fields)))


def test_from_diffusers_and_back_to_the_bit(karlo: Path, karlo_bundle: Path, tmp_path: Path) -> None:
    convert(source=str(karlo_bundle), to="diffusers", out=str(tmp_path / "back"))
    for part in NETWORKS:
        theirs, back = weights(karlo, part), weights(tmp_path / "back", part)
        assert theirs.keys() == back.keys(), part
        assert all(torch.equal(theirs[name], back[name]) for name in theirs), part
    for part in (*NETWORKS[:5], *SCHEDULERS):
        assert settings(tmp_path / "back", part) == settings(karlo, part), part
    # transformers writes many settings of training besides; all that ours have are theirs.
    for part in NETWORKS[5:]:
        theirs, back = settings(karlo, part), settings(tmp_path / "back", part)
        unlike = {name for name, value in back.items() if theirs.get(name, value) != value}
        assert unlike <= {"eos_token_id", "bos_token_id", "pad_token_id"}, (part, unlike)


def test_from_ours_and_back_to_the_bit(karlo_bundle: Path, tmp_path: Path) -> None:
    """With settings that diffusers has no place for."""
    mine = tmp_path / "mine"
    shutil.copytree(karlo_bundle, mine)
    bundle = Bundle.load(str(mine))
    changes: Mapping[str, dict[str, Any]] = {
        "prior": {"num_inference_steps": 9, "guidance_scale": 2.5},
        "decoder": {"num_inference_steps": 11, "guidance_scale": 3.5},
        "upsampler_256": {"num_inference_steps": 4},
    }
    for name, sampling in changes.items():
        config = bundle.configs[name].merged({"sampling": sampling})
        resave(mine, config, bundle.load_model(name).state_dict())
    convert(source=str(mine), to="diffusers", out=str(tmp_path / "theirs"))
    convert(source=str(tmp_path / "theirs"), kind="diffusers", out=str(tmp_path / "back"))
    before, after = Bundle.load(str(mine)), Bundle.load(str(tmp_path / "back"))
    assert after.configs == before.configs
    assert after.digest == before.digest  # of configurations, weights and CLIP


def test_the_temperature_of_clip_comes_back(karlo: Path, tmp_path: Path) -> None:
    """Which no part of a folder holds."""
    folder = copied(karlo, tmp_path / "folder")
    (folder / "unclip.json").write_text(json.dumps({"clip": {"logit_scale": 3.25}}))
    convert(source=str(folder), kind="diffusers", out=str(tmp_path / "bundle"))
    assert Bundle.load(str(tmp_path / "bundle")).load_model("clip").clip.logit_scale.tolist() == [3.25]
    convert(source=str(tmp_path / "bundle"), to="diffusers", out=str(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "unclip.json").read_text())["clip"] == {"logit_scale": 3.25}


def test_every_tensor_is_accounted_for(karlo: Path) -> None:
    accounts = {a.part: a for stage in import_folder(Source(str(karlo))) for a in stage.accounts}
    for part in ("decoder", "text_proj", "super_res_first", "super_res_last", "text_encoder"):
        assert accounts[part].taken == len(weights(karlo, part))
        assert not accounts[part].dropped
    assert accounts["prior"].taken == len(weights(karlo, "prior")) - 2
    assert set(accounts["prior"].dropped) == {"clip_mean", "clip_std"}


@pytest.mark.parametrize("part", ["prior", "decoder", "super_res_last", "text_encoder", "image_encoder"])
def test_a_tensor_too_many_or_too_few_is_refused(karlo: Path, tmp_path: Path, part: str) -> None:
    folder = copied(karlo, tmp_path / "folder")
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    lost = max(tensors)
    path.unlink()
    save_file({**{name: value for name, value in tensors.items() if name != lost}, "new.weight": torch.ones(1)}, path)
    with pytest.raises(InteropError, match=f"{lost.replace('.', '[.]')} is missing, new.weight is unknown"):
        list(import_folder(Source(str(folder))))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("decoder", {"act_fn": "gelu"}, "decoder: act_fn = 'gelu'"),
        ("decoder", {"added_later": 3}, "decoder: unknown added_later = 3"),
        ("decoder", {"addition_embed_type": "text_image"}, "decoder: addition_embed_type = 'text_image'"),
        ("decoder", {"class_embed_type": GONE}, "decoder: class_embed_type = None"),
        ("decoder", {"block_out_channels": []}, r"decoder: block_out_channels = \[\]"),
        ("decoder", {"attention_head_dim": 7}, "decoder: UNetConfig: head_channels = 7: does not divide"),
        ("text_proj", {"clip_extra_context_tokens": 0}, "text_proj: num_image_tokens = 0"),
        ("text_encoder", {"num_attention_heads": 3}, "text_encoder: ClipTextConfig: heads = 3: does not divide"),
        ("text_encoder", {"projection_dim": "x"}, "projection_dim = 'x'"),
        ("image_encoder", {"num_attention_heads": 5}, "image_encoder: num_attention_heads = 5: does not divide"),
        ("tokenizer", {"bos_token": "<s>"}, "tokenizer: bos_token = '<s>'"),
        ("decoder", {"norm_num_groups": 16}, "decoder: norm_num_groups = 16"),
        ("super_res_first", {"add_attention": True}, "super_res_first: add_attention = True"),
        ("super_res_last", {"layers_per_block": 2}, "super_res_last: its shape is not that of super_res_first"),
        ("prior", {"added_emb_type": None}, "prior: added_emb_type = None"),
        ("prior", {"num_embeddings": 77}, "prior: num_embeddings = 77"),
        ("text_encoder", {"hidden_act": "relu"}, "text_encoder: hidden_act = 'relu'"),
        ("text_encoder", {"eos_token_id": 7}, "text_encoder: eos_token_id = 7"),
        ("image_encoder", {"layer_norm_eps": 1e-6}, "image_encoder: layer_norm_eps = 1e-06"),
        ("decoder_scheduler", {"_class_name": "DDIMScheduler"}, "decoder_scheduler: _class_name = 'DDIMScheduler'"),
        ("decoder_scheduler", {"thresholding": True}, "decoder_scheduler: unknown thresholding = True"),
        ("prior_scheduler", {"beta_schedule": "linear"}, "prior_scheduler: beta_schedule = 'linear'"),
        ("feature_extractor", {"image_mean": [0.5, 0.5, 0.5]}, "feature_extractor: image_mean"),
        ("feature_extractor", {"do_center_crop": False}, "feature_extractor: do_center_crop = False"),
        ("feature_extractor", {"crop_size": 8}, "feature_extractor: crop_size = 8"),
        ("tokenizer", {"model_max_length": 77}, "tokenizer: model_max_length = 77"),
    ],
)
def test_what_a_configuration_says_and_ours_has_not_is_refused(
    karlo: Path, tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    folder = copied(karlo, tmp_path / "folder")
    (path,) = (folder / part).glob("*config*.json")
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not GONE}))
    with pytest.raises(InteropError, match=message):
        list(import_folder(Source(str(folder))))


def test_a_folder_without_its_clip_wants_it_named_and_checks_it(
    karlo: Path, karlo_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(karlo, folder, ignore=shutil.ignore_patterns("image_encoder", "feature_extractor"))
    with pytest.raises(InteropError, match="has no image_encoder"):
        list(import_folder(Source(str(folder))))
    clip = str(karlo_bundle / "clip")
    convert(source=str(folder), kind="diffusers", out=str(tmp_path / "bundle"), clip=clip)
    assert set(Bundle.load(str(tmp_path / "bundle")).configs) == {"prior", "decoder", "upsampler_256"}
    assert (
        Bundle.load(str(tmp_path / "bundle")).load_clip().fingerprint == Bundle.load(str(karlo_bundle)).clip.fingerprint
    )
    in_half = copied(folder, tmp_path / "half")
    for path in in_half.glob("*/*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(tensors, path)
    assert len(list(import_folder(Source(str(in_half), clip=clip)))) == 3
    make_karlo(tmp_path / "other", seed=1)
    convert(source=str(tmp_path / "other"), kind="diffusers", out=str(tmp_path / "strange"))
    with pytest.raises(InteropError, match="is not that of the folder's text_encoder"):
        list(import_folder(Source(str(folder), clip=str(tmp_path / "strange" / "clip"))))


def resave(uri: Path, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    clip = Bundle.load(str(uri)).clip if config.in_clip_space else None
    save_stage(str(uri), config, tensors=tensors, clip=clip, provenance={})


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("prior", {"num_draws": 2}, "prior: num_draws = 2"),
        ("prior", {"unit_norm": True}, "prior: unit_norm = True"),
        ("prior", {"sampling": {"sampler": "ddim"}}, "prior: sampling.sampler = 'ddim'"),
        ("decoder", {"diffusion": {"clip_sample_range": None, "dynamic_threshold": 0.99}}, "dynamic_threshold = 0.99"),
        ("decoder", {"diffusion": {"beta_schedule": "linear"}}, "decoder: diffusion.beta_schedule = 'linear'"),
        ("decoder", {"sampling": {"guidance_interval": [0.1, 0.5]}}, "decoder: sampling.guidance_interval"),
        ("decoder", {"sampling": {"timestep_spacing": "trailing"}}, "decoder: sampling visits other timesteps"),
        ("decoder", {"sampling": {"num_inference_steps": 1}}, "num_inference_steps = 1"),
        ("decoder", {"normalizer": {"std": 0.5}}, "decoder: normalizer"),
        ("upsampler_256", {"model": {"resize": "bilinear"}}, "upsampler_256: model.resize = 'bilinear'"),
        ("upsampler_256", {"diffusion": {"variance_type": "fixed_large"}}, "variance_type = 'fixed_large'"),
    ],
)
def test_what_diffusers_cannot_do_is_refused_before_anything_is_written(
    karlo_bundle: Path, tmp_path: Path, stage: str, changes: dict[str, Any], message: str
) -> None:
    bundle = Bundle.load(str(karlo_bundle))
    bundle = replace(bundle, configs={**bundle.configs, stage: bundle.configs[stage].merged(changes)})
    with pytest.raises(InteropError, match=message):
        check_exportable(bundle)
    with pytest.raises(InteropError, match=message):
        export_bundle(bundle, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_stages_that_diffusers_does_not_know_are_refused(karlo_bundle: Path) -> None:
    bundle = Bundle.load(str(karlo_bundle))
    large = bundle.configs["upsampler_256"].to_dict() | {"kind": "upsampler_1024"}
    with pytest.raises(InteropError, match="has the stage upsampler_1024"):
        check_exportable(replace(bundle, configs={**bundle.configs, "upsampler_1024": stage_config_from_dict(large)}))
    left = {name: config for name, config in bundle.configs.items() if name != "decoder"}
    with pytest.raises(InteropError, match="has no decoder"):
        check_exportable(replace(bundle, configs=left))
    prior = stage_config_from_dict(AR_PRIOR)
    with pytest.raises(InteropError, match="prior_type = 'autoregressive'"):
        check_exportable(replace(bundle, configs={**bundle.configs, "prior": prior}))


def test_prior_and_decoder_must_read_captions_alike(karlo_bundle: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(karlo_bundle, mine)
    bundle = Bundle.load(str(mine))
    tensors = bundle.load_model("prior").state_dict()
    tensors["prefix.encoder.tower.ln_final.bias"] += 1
    resave(mine, bundle.configs["prior"], tensors)
    with pytest.raises(InteropError, match="different text transformers"):
        export_bundle(Bundle.load(str(mine)), tmp_path / "theirs")
    assert list(tmp_path.iterdir()) == [mine]


def test_a_bundle_of_variations_alone(karlo_bundle: Path, tmp_path: Path) -> None:
    mine, theirs, back = tmp_path / "mine", tmp_path / "theirs", tmp_path / "back"
    shutil.copytree(karlo_bundle, mine, ignore=shutil.ignore_patterns("prior"))
    convert(source=str(mine), to="diffusers", out=str(theirs))
    index = json.loads((theirs / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPImageVariationPipeline"
    assert "prior" not in index
    assert not (theirs / "prior").exists()
    convert(source=str(theirs), kind="diffusers", out=str(back))
    assert Bundle.load(str(back)).digest == Bundle.load(str(mine)).digest


def test_the_job_prints_the_account_and_a_dry_run_writes_nothing(
    karlo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.convert import main

    arguments = ["--set", f"source={karlo}", "--set", "kind=diffusers", "--set", f"out={tmp_path / 'bundle'}"]
    assert main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"decoder: {len(weights(karlo, 'decoder'))} tensors make " in printed
    assert "left out: clip_mean (is normalizer.mean of the configuration)" in printed
    assert not (tmp_path / "bundle").exists()
    assert main(arguments) == 0
    stored = Bundle.load(str(tmp_path / "bundle")).manifests["prior"].provenance
    assert set(stored["dropped"]) == {"clip_mean", "clip_std"}
    assert "clip\\_mean" in (tmp_path / "bundle" / "README.md").read_text()
    assert main(["--set", "to=diffusers", *arguments[:2], "--set", f"out={tmp_path / 'again'}"]) == 2
    assert "is no bundle" in capsys.readouterr().err


def test_weights_in_a_bin_are_taken_where_they_are_tensors_alone(karlo: Path, tmp_path: Path) -> None:
    folder = copied(karlo, tmp_path / "folder")
    (path,) = (folder / "text_proj").glob("*.safetensors")
    tensors, pickled = load_file(path), path.with_suffix(".bin")
    path.unlink()
    torch.save(tensors, pickled)
    stages = {stage.config.kind: stage for stage in import_folder(Source(str(folder)))}
    mine = stages["decoder"].tensors["conditioners.image.null_embed"]
    assert torch.equal(mine, tensors["learned_classifier_free_guidance_embeddings"])
    torch.save({**tensors, "hook": folder}, pickled)
    with pytest.raises(InteropError, match=r"text_proj.*\.bin' is not read, as it is no file of tensors alone"):
        list(import_folder(Source(str(folder))))


def test_the_job_refuses_a_clip_that_is_none(karlo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.convert import main

    folder = tmp_path / "folder"
    shutil.copytree(karlo, folder, ignore=shutil.ignore_patterns("image_encoder", "feature_extractor"))
    arguments = [f"source={folder}", "kind=diffusers", f"out={tmp_path / 'bundle'}", "clip=ViT-B-33"]
    assert main([word for argument in arguments for word in ("--set", argument)]) == 2
    assert "clip = 'ViT-B-33'" in capsys.readouterr().err


def test_a_clip_is_stored_by_what_it_is_called_from_anywhere(
    karlo: Path, karlo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(karlo, folder, ignore=shutil.ignore_patterns("image_encoder", "feature_extractor"))
    monkeypatch.chdir(karlo_bundle)
    convert(source=str(folder), kind="diffusers", out=str(tmp_path / "bundle"), clip="clip")
    monkeypatch.chdir(tmp_path)
    bundle = Bundle.load(str(tmp_path / "bundle"))
    assert bundle.load_clip().fingerprint == bundle.clip.fingerprint


def test_a_dry_run_refuses_what_would_be_refused(karlo: Path, karlo_bundle: Path, tmp_path: Path) -> None:
    def dry_run(**fields: str) -> None:
        list(run_convert(ConvertConfig(**fields), dry_run=True))

    make_karlo(tmp_path / "other", seed=1)
    with pytest.raises(BundleError, match="export it to a bundle of its own"):
        dry_run(source=str(tmp_path / "other"), kind="diffusers", out=str(karlo_bundle))
    with pytest.raises(InteropError, match="is there already"):
        dry_run(source=str(karlo_bundle), to="diffusers", out=str(karlo))
    dry_run(source=str(karlo_bundle), to="diffusers", out=str(tmp_path / "theirs"))
    assert not (tmp_path / "theirs").exists()


def test_embeddings_of_any_norm_go_with_stages_that_expect_them(karlo_bundle: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_bundle(str(karlo_bundle))
    pictures = torch.arange(2 * 16 * 16 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).view(2, 16, 16, 3)
    embeds = pipeline.encode_image(pictures)
    assert (embeds.norm(dim=1) - 1).abs().min() > 0.1
    draw = pipeline.draw([1, 2], options=GenerationOptions.from_dict({"decoder": {"num_inference_steps": 2}}))
    other = draw.decode(image_embed=torch.nn.functional.normalize(embeds, dim=1))
    assert not torch.equal(draw.decode(image_embed=embeds), other)
    mine = tmp_path / "mine"
    shutil.copytree(karlo_bundle, mine)
    bundle = Bundle.load(str(mine))
    config = bundle.configs["prior"].merged({"unit_norm": True})
    resave(mine, config, bundle.load_model("prior").state_dict())
    with pytest.raises(BundleError, match=r"decoder\.unit_norm = False: the prior makes embeddings of unit norm"):
        Pipeline.from_bundle(str(mine))


def test_an_upsampler_of_one_network_is_both_of_theirs(karlo: Path, karlo_bundle: Path, tmp_path: Path) -> None:
    mine = copied(karlo_bundle, tmp_path / "mine")
    bundle = Bundle.load(str(mine))
    tensors = bundle.load_model("upsampler_256").state_dict()
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    resave(mine, bundle.configs["upsampler_256"].merged({"model": {"last_step": False}}), first)
    convert(source=str(mine), to="diffusers", out=str(tmp_path / "theirs"))
    expected = weights(karlo, "super_res_first")
    for part in ("super_res_first", "super_res_last"):
        found = weights(tmp_path / "theirs", part)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_engine_draws_what_the_pipeline_draws(karlo_bundle: Path) -> None:
    """With samples at the last step, which has its own network, beside others that are not."""
    pipeline = Pipeline.from_bundle(str(karlo_bundle))
    engine, tickets = Engine(Stages.of(pipeline), EngineConfig(memory_bytes=2**33)), {}
    for seed, steps in enumerate((2, 3)):
        stages = {name: {"num_inference_steps": steps} for name in ("prior", "decoder", "upsampler_256")}
        options = GenerationOptions.from_dict(stages)
        tickets[seed] = options, engine.submit(Request(prompt="a red square", seed=seed, options=options))
    run(engine)
    for seed, (options, ticket) in tickets.items():
        alone = pipeline(["a red square"], [seed], options=options)
        assert_same_pictures(ticket.result(0).images, {size: images[0] for size, images in alone.images.items()})
