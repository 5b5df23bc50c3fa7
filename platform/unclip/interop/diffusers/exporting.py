"""A bundle to an UnCLIP folder that diffusers loads, and that gives the same pictures there; what does not fit is refused.

Refused is whatever diffusers' pipeline cannot do: captions that do not go through CLIP's text transformer, embeddings of unit
norm, autoregressive priors, several draws, samplers but its own, a stage for 1024 pixels, guides.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from unclip.interop import hf_clip
from unclip.interop.diffusers import configs, load_pipeline, networks
from unclip.interop.diffusers.index import EXTRAS, TEXT_TO_IMAGE, VARIATION, model_index
from unclip.interop.diffusers.schedulers import scheduler_of
from unclip.interop.diffusers.tokenizer import write_tokenizer
from unclip.interop.folder import write_object, write_part
from unclip.interop.hf_clip_folder import PICTURE_STEPS
from unclip.interop.keys import Account, Entry, InteropError, prefixed, to_theirs
from unclip.models.clip_text import ClipTextConfig
from unclip.models.normalizer import EmbeddingNormalizerConfig
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.stages import (
    ClipStageConfig,
    DecoderStageConfig,
    PriorStageConfig,
    StageConfig,
    UpsamplerStageConfig,
)

Tensors = dict[str, torch.Tensor]

_TOWERS = {"prior": "prefix.encoder.tower.", "decoder": "conditioners.text.encoder.tower."}
_PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    **PICTURE_STEPS,
    "do_convert_rgb": True,
    "resample": 3,
}


def check_exportable(bundle: Bundle) -> None:
    """Raises `InteropError` naming what of the bundle diffusers' pipelines cannot do; reads no weights."""
    stages = bundle.configs
    for name in ("decoder", "upsampler_256"):
        if name not in stages:
            raise InteropError(f"{bundle.uri}: has no {name}, which diffusers' pipelines do not go without")
    for name in ("upsampler_1024", "noised_clip", "classifier"):
        if name in stages:
            raise InteropError(
                f"{bundle.uri}: has the stage {name}, which diffusers' pipelines do not know: leave it out"
            )
    decoder, upsampler = stages["decoder"], stages["upsampler_256"]
    assert isinstance(decoder, DecoderStageConfig)
    assert isinstance(upsampler, UpsamplerStageConfig)
    text = _check_decoder(decoder)
    _check_upsampler(upsampler)
    scheduler_of("decoder", decoder.diffusion, decoder.sampling)
    scheduler_of("upsampler_256", upsampler.diffusion, upsampler.sampling)
    configs.unet_settings("decoder", decoder.model.unet, context_dim=decoder.model.context_dim)
    configs.unet_settings("upsampler_256", upsampler.model.unet, context_dim=None)
    if "prior" in stages:
        _check_prior(stages["prior"], text)
    elif not isinstance(stages.get("clip"), ClipStageConfig):
        raise InteropError(f"{bundle.uri}: has neither a prior nor a clip stage: there is no pipeline for the rest")


def export_bundle(bundle: Bundle, out: Path, *, dry_run: bool = False) -> list[Account]:
    """Writes the folder `out`, which must not be there yet, as a whole or not at all; a dry run only checks, without weights.

    With a prior it is an `UnCLIPPipeline`, and an `UnCLIPImageVariationPipeline` too where the bundle has its CLIP.
    """
    check_exportable(bundle)
    if out.exists():
        raise InteropError(f"out = {str(out)!r}: is there already")
    if dry_run:
        return []
    made = out.with_name(f"{out.name}.{uuid.uuid4().hex}.tmp")
    made.mkdir(parents=True)
    try:
        accounts = _Export(bundle, made).write()
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return accounts


class _Export:
    """A folder that is being written, one stage in memory at a time."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.accounts: list[Account] = []
        self.extras: dict[str, Any] = {}
        self.tower: Tensors = {}

    def write(self) -> list[Account]:
        stages = self.bundle.configs
        parts: dict[str, Callable[[Any], None]] = {
            "prior": self._prior,
            "decoder": self._decoder,
            "upsampler_256": self._upsampler,
            "clip": self._clip,
        }
        for name, write in parts.items():
            if name in stages:
                write(stages[name])  # type: ignore[index]
        write_object(self.folder / "model_index.json", model_index(TEXT_TO_IMAGE if "prior" in stages else VARIATION))
        write_object(self.folder / EXTRAS, self.extras)
        if "clip" not in stages:
            reason = "the bundle has no clip stage: without image_encoder there are no variations of pictures"
            self.accounts.append(Account("image_encoder", taken=0, made=0, dropped={"image_encoder": reason}))
        shutil.copy(load_pipeline.__file__, self.folder / "load_pipeline.py")
        return self.accounts

    def _prior(self, config: PriorStageConfig) -> None:
        tensors = self._without_tower("prior")
        entries = [*networks.prior_entries(config.model), *networks.caption_entries()]
        theirs = self._mapped("prior", entries, tensors)
        theirs |= _statistics(config.normalizer, config.model.embed_dim)
        write_part(self.folder, "prior", configs.prior_settings(config.model), theirs)
        self._scheduler("prior", "prior", config)

    def _decoder(self, config: DecoderStageConfig) -> None:
        model, tensors = config.model, self._without_tower("decoder")
        assert model.clip_text is not None
        unet = {name: tensors.pop(name) for name in list(tensors) if name.startswith("unet.")}
        theirs = self._mapped("decoder", prefixed(networks.unet_entries(model.unet), ours="unet."), unet)
        settings = configs.unet_settings("decoder", model.unet, context_dim=model.context_dim)
        write_part(self.folder, "decoder", settings, theirs)
        entries = prefixed(networks.text_proj_entries(model.num_image_tokens), ours="conditioners.")
        settings = {
            "_class_name": "UnCLIPTextProjModel",
            "clip_embeddings_dim": model.embed_dim,
            "clip_extra_context_tokens": model.num_image_tokens,
            "cross_attention_dim": model.context_dim,
            "time_embed_dim": model.unet.embedding_dim,
        }
        write_part(self.folder, "text_proj", settings, self._mapped("text_proj", entries, tensors))
        text = model.clip_text.encoder
        theirs = self._mapped("text_encoder", hf_clip.text_entries(text), self.tower)
        write_part(self.folder, "text_encoder", hf_clip.text_settings(text), theirs)
        write_tokenizer(self.folder / "tokenizer", text.context_length)
        self._scheduler("decoder", "decoder", config)

    def _upsampler(self, config: UpsamplerStageConfig) -> None:
        tensors = self._tensors("upsampler_256")
        last = "last_unet." if config.model.last_step else "unet."  # one network is both of theirs
        for part, prefix in (("super_res_first", "unet."), ("super_res_last", last)):
            mine = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            theirs = self._mapped(part, prefixed(networks.unet_entries(config.model.unet), ours=prefix), mine)
            write_part(self.folder, part, configs.unet_settings(part, config.model.unet, context_dim=None), theirs)
        self._scheduler("super_res", "upsampler_256", config)

    def _clip(self, config: ClipStageConfig) -> None:
        """What makes variations of pictures possible; the text transformer is that of the decoder."""
        shape = config.architecture
        tensors = {name.removeprefix("clip."): tensor for name, tensor in self._tensors("clip").items()}
        self.extras["clip"] = {"logit_scale": float(tensors.pop("logit_scale"))}
        text = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
        if hf_clip.text_of(shape) != self._text or not _equal(text, self.tower):
            raise InteropError(
                "decoder: its text transformer is not that of the stage clip; diffusers has one for both"
            )
        vision = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
        theirs = self._mapped("image_encoder", hf_clip.vision_entries(shape), vision)
        write_part(self.folder, "image_encoder", hf_clip.vision_settings(shape), theirs)
        with torch.device("meta"):
            description = config.build().description
        side = shape.image_size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        pixels = {"image_mean": list(description.mean), "image_std": list(description.std)}
        write_part(self.folder, "feature_extractor", {**_PREPROCESSING, **sizes, **pixels})

    @property
    def _text(self) -> ClipTextConfig:
        decoder = self.bundle.configs["decoder"]
        assert isinstance(decoder, DecoderStageConfig)
        assert decoder.model.clip_text is not None
        return decoder.model.clip_text.encoder

    def _scheduler(self, part: str, stage: str, config: Any) -> None:
        """Also remembers what a scheduler does not say, and a call of the pipeline has to."""
        sampling = config.sampling
        settings = scheduler_of(stage, config.diffusion, sampling)
        write_part(self.folder, f"{part}_scheduler", settings)
        self.extras[stage] = {
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
        }

    def _tensors(self, stage: Any) -> Tensors:
        return dict(self.bundle.load_model(stage).state_dict())

    def _without_tower(self, stage: str) -> Tensors:
        """The tensors of a stage but those of its text transformer, which is kept, and the same in all stages."""
        tensors, prefix = self._tensors(stage), _TOWERS[stage]
        tower = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        if self.tower and not _equal(self.tower, tower):
            raise InteropError("prior and decoder have different text transformers inside; diffusers has one for both")
        self.tower = tower
        return tensors

    def _mapped(self, part: str, entries: list[Entry], ours: Mapping[str, torch.Tensor]) -> Tensors:
        theirs, account = to_theirs(part, entries, ours)
        self.accounts.append(account)
        return theirs


def _check_decoder(config: DecoderStageConfig) -> ClipTextConfig:
    model = config.model
    if model.clip_text is None or model.embed_dim is None:
        told = ", ".join(model.inputs)
        raise InteropError(
            f"decoder: model.clip_text is null, and it is told {told}: diffusers' decoder sees an image embedding and the "
            "states of a CLIP text transformer"
        )
    text = model.clip_text.encoder
    if config.normalizer != EmbeddingNormalizerConfig():
        raise InteropError("decoder: normalizer: diffusers' decoder sees z_i as it is; mean must be 0 and std 1")
    _refuse(
        "decoder",
        ("unit_norm", config.unit_norm, False, "in diffusers nothing brings embeddings to unit norm"),
        ("model.num_classes", model.num_classes, None, "diffusers' decoder knows no classes"),
        ("model.inpainting", model.inpainting, False, "diffusers' decoder sees no known pixels"),
        (
            "diffusion.variance_type",
            config.diffusion.variance_type,
            "learned_range",
            "its pipeline takes that for granted",
        ),
        ("model.clip_text.encoder.width", text.width, model.embed_dim, "UnCLIPTextProjModel has one width for both"),
        (
            "model.clip_text.encoder.embed_dim",
            text.embed_dim,
            model.embed_dim,
            "UnCLIPTextProjModel has one width for both",
        ),
        ("image_size", config.image_size, model.unet.image_size, "its pipeline makes pictures of that size"),
    )
    return text


def _check_prior(config: StageConfig, text: ClipTextConfig) -> None:
    if not isinstance(config, PriorStageConfig):
        raise InteropError("prior: prior_type = 'autoregressive': diffusers has diffusion priors alone")
    if config.model.clip_text != text:
        raise InteropError(
            "prior: model.clip_text is not that of the decoder: diffusers' prior sees captions through the same CLIP text "
            "transformer"
        )
    _refuse(
        "prior",
        ("unit_norm", config.unit_norm, False, "in diffusers nothing brings embeddings to unit norm"),
        ("num_draws", config.num_draws, 1, "diffusers draws one"),
    )
    scheduler_of("prior", config.diffusion, config.sampling)


def _check_upsampler(config: UpsamplerStageConfig) -> None:
    _refuse(
        "upsampler_256",
        ("model.resize", config.model.resize, "bicubic", "diffusers enlarges the small picture so"),
        (
            "model.noise_conditioning",
            config.model.noise_conditioning,
            False,
            "diffusers adds no noise to the small picture",
        ),
        ("diffusion.variance_type", config.diffusion.variance_type, "fixed_small", "its pipeline takes three channels"),
        ("image_size", config.image_size, config.model.unet.image_size, "its pipeline makes pictures of that size"),
    )


def _refuse(stage: str, *rules: tuple[str, object, object, str]) -> None:
    for name, value, allowed, reason in rules:
        if value != allowed:
            raise InteropError(f"{stage}: {name} = {value!r}: must be {allowed!r}, as {reason}")


def _statistics(config: EmbeddingNormalizerConfig, embed_dim: int) -> Tensors:
    """Mean and deviation of the prior's embeddings, (1, D) each."""
    normalizer = config.build()
    pairs = (("clip_mean", normalizer.mean), ("clip_std", normalizer.std))
    return {name: value.expand(embed_dim)[None].contiguous() for name, value in pairs}


def _equal(ours: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)
