"""Karlo's own files (kakaobrain/karlo): prior, decoder and improved upsampler, as stages of ours.

A folder with `prior-ckpt-*.ckpt`, `ViT-L-14_stats.th`, `decoder-ckpt-*.ckpt` and `improved-sr-ckpt-*.ckpt`, or some of them. Its
CLIP, `ViT-L-14.pt`, is a TorchScript archive: a program, which is not run here. It is OpenAI's, so it is named instead,
`clip=ViT-L-14-quickgelu/openai`; its text transformer becomes part of prior and decoder.

What the weights do not say is that of the published models. Where the folder, or `configs/` in it, also has Karlo's YAML
files, they are held against that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from unclip.config.base import read_settings
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import SamplingConfig
from unclip.interop.adm_names import transformer_depth, transformer_entries, unet_config, unet_entries
from unclip.interop.base import ImportedStage, Source, shapes_of
from unclip.interop.keys import (
    Account,
    Entry,
    InteropError,
    Shapes,
    Tensors,
    layer,
    prefixed,
    reshaped,
    same,
    to_ours,
    tokens_fastest,
)
from unclip.interop.settings import checked
from unclip.interop.torch_files import read_content, read_tensors, shapes_in, within
from unclip.models.clip import ClipModel
from unclip.models.clip_text import ClipTextConfig
from unclip.models.conditioners import ClipCaptionConfig
from unclip.models.decoder import DecoderConfig
from unclip.models.prior import PriorConfig
from unclip.models.upsampler import UpsamplerConfig
from unclip.pipelines.bundle import ClipReference
from unclip.pipelines.clips import load_clip_named
from unclip.pipelines.stages import DecoderStageConfig, PriorStageConfig, StageConfig, UpsamplerStageConfig

_FILES = {
    "prior": "prior-ckpt-*.ckpt",
    "statistics": "*_stats.th",
    "decoder": "decoder-ckpt-*.ckpt",
    "upsampler": "improved-sr-ckpt-*.ckpt",
}
_KEY = "state_dict"
_HEAD_WIDTH = 64
_DECODER_SIZE, _UPSAMPLER_SIZE = 64, 256
_CLAMP = 10.0
"""Of the prior's predicted embeddings, whitened (Karlo's prior_model.py; diffusers' folder of it says 5)."""
_STEP_TOKENS = 4  # text embedding, timestep, noised image embedding, query
_YAML_KINDS = {"prior": "prior", "t2i-decoder": "decoder", "improved_sr_64_256": "upsampler"}
_DIFFUSION: Mapping[str, Mapping[str, Any]] = {
    "prior": {"learn_sigma": False, "sigma_small": True, "predict_xstart": True},
    "decoder": {"learn_sigma": True, "predict_xstart": False},
    "upsampler": {"learn_sigma": False, "sigma_small": True, "predict_xstart": False},
}
_SCHEDULE = {"steps": 1000, "noise_schedule": "squaredcos_cap_v2"}


def import_karlo(source: Source) -> Iterator[ImportedStage]:
    """The stages of Karlo's that the folder `source.path` has; see `Importer`."""
    folder = Path(source.path)
    files = {part: _file(folder, pattern) for part, pattern in _FILES.items()}
    if not any(files.values()):
        raise InteropError(f"{source.path!r}: has none of {', '.join(_FILES.values())}")
    if (files["prior"] is None) != (files["statistics"] is None):
        raise InteropError(f"{source.path!r}: {_FILES['prior']} and {_FILES['statistics']} go together; one is missing")
    settings = _settings(folder)
    clip = _Clip.named(source.clip) if files["prior"] or files["decoder"] else None
    if files["prior"] is not None and files["statistics"] is not None and clip is not None:
        yield _prior(read_tensors(files["prior"], _KEY), _statistics(files["statistics"]), clip, settings)
    if files["decoder"] is not None and clip is not None:
        yield _decoder(read_tensors(files["decoder"], _KEY), clip, settings)
    if files["upsampler"] is not None:
        yield _upsampler(read_tensors(files["upsampler"], _KEY), settings)


class _Clip:
    """The CLIP whose text transformer prior and decoder see captions through."""

    def __init__(self, source: str, model: ClipModel) -> None:
        self.reference = ClipReference(source=source, fingerprint=model.fingerprint)
        described = model.description.model
        text = described["text_cfg"]
        self.config = ClipTextConfig(
            vocab_size=text.get("vocab_size", 49408),
            context_length=model.context_length,
            width=text["width"],
            depth=text["layers"],
            heads=text["heads"],
            embed_dim=model.embed_dim,
            quick_gelu=bool(described.get("quick_gelu", False)),
        )
        state = model.clip.state_dict()
        self.tensors: Tensors = {name.removeprefix("text."): tensor for name, tensor in state.items()}

    @classmethod
    def named(cls, source: str | None) -> _Clip:
        if source is None:
            raise InteropError(
                "clip: required, as ViT-L-14.pt is a TorchScript archive, which is a program and is not run: "
                "clip=ViT-L-14-quickgelu/openai is the same model"
            )
        return cls(source, load_clip_named(source))

    def tower(self, shapes: Shapes, prefix: str) -> tuple[dict[str, torch.Tensor], Account]:
        """Its text transformer as the part of a stage whose names begin with `prefix`."""
        wanted = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        names = [name.removeprefix(prefix) for name in wanted]
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise InteropError(f"clip = {self.reference.source!r}: has no {missing[0]}; it is no CLIP of Karlo's kind")
        entries = [entry for name in names for entry in same(prefix + name, name)]
        found = {name: self.tensors[name] for name in names}
        return to_ours("CLIP's text transformer", entries, found, wanted)


def prior_entries(config: PriorConfig) -> list[Entry]:
    """Karlo's prior without the prefix of its names, and ours without CLIP's text transformer."""
    length, width = config.context_length + _STEP_TOKENS, config.width
    return [
        *reshaped("positional_embedding", "positional_embedding", (length, width), (1, length, width)),
        *reshaped("query", "prd_emb", (width,), (1, 1, width)),
        *layer("time_embed.layers.0", "time_embed.0"),
        *layer("time_embed.layers.2", "time_embed.2"),
        *layer("prefix.states_in", "text_enc_proj"),
        *layer("prefix.text_embed_in", "text_emb_proj"),
        *layer("image_embed_in", "clip_img_proj"),
        *prefixed(transformer_entries(config.depth), ours="transformer.", theirs="transformer."),
        *layer("transformer.final_norm", "final_ln"),
        *layer("image_embed_out", "out_proj"),
    ]


def decoder_entries(ours: Shapes, config: DecoderConfig) -> list[Entry]:
    """Karlo's decoder without the prefix of its names, and ours without CLIP's text transformer."""
    unet = [name.removeprefix("unet.") for name in ours if name.startswith("unet.")]
    text, image = "conditioners.text.", "conditioners.image."
    return [
        *prefixed(unet_entries(unet, config.unet), ours="unet."),
        *layer(f"{text}to_context", "text_seq_proj.0"),
        *layer(f"{text}norm", "text_seq_proj.1"),
        *layer(f"{text}to_time", "text_feat_proj"),
        *layer(f"{image}to_time", "clip_emb"),
        *tokens_fastest(f"{image}to_tokens", "clip_tok_proj", config.num_image_tokens),
        *same(f"{image}null_embed", "cf_param"),
    ]


def _prior(
    theirs: Tensors, statistics: Mapping[str, list[float]], clip: _Clip, settings: Mapping[str, Any]
) -> ImportedStage:
    shapes = within(shapes_in(theirs), "model.")
    width, embed_dim = _shape(shapes, "clip_img_proj.weight")
    depth, length = transformer_depth(shapes), _shape(shapes, "positional_embedding")[1] - _STEP_TOKENS
    heads = max(1, width // _HEAD_WIDTH)
    _compare(
        "prior",
        settings,
        text_ctx=length,
        xf_width=width,
        xf_layers=depth,
        xf_heads=heads,
        xf_final_ln=True,
        clip_dim=embed_dim,
    )
    config = checked(
        "prior",
        PriorStageConfig,
        {
            "model": {
                "embed_dim": embed_dim,
                "vocab_size": clip.config.vocab_size,
                "context_length": length,
                "width": width,
                "depth": depth,
                "heads": heads,
                "clip_text": clip.config.to_dict(),
            },
            "diffusion": DiffusionConfig(prediction_type="sample", clip_sample_range=_CLAMP).to_dict(),
            "sampling": SamplingConfig(num_inference_steps=25, guidance_scale=4.0).to_dict(),
            "normalizer": statistics,
            "unit_norm": False,
            "num_draws": 1,
        },
    )
    entries = prefixed(prior_entries(config.model), theirs="model.")
    return _with_tower(config, clip, "prefix.encoder.tower.", "Karlo's prior", entries, theirs)


def _decoder(theirs: Tensors, clip: _Clip, settings: Mapping[str, Any]) -> ImportedStage:
    shapes = within(shapes_in(theirs), "model.")
    unet = unet_config(shapes, image_size=_DECODER_SIZE, head_channels=_HEAD_WIDTH)
    context, embed_dim = _shape(shapes, "clip_tok_proj.weight")[0], _shape(shapes, "clip_tok_proj.weight")[1]
    width = _shape(shapes, "text_seq_proj.0.weight")[0]
    _compare(
        "decoder",
        settings,
        image_size=_DECODER_SIZE,
        num_channels=unet.channels,
        num_res_blocks=unet.depth,
        num_head_channels=_HEAD_WIDTH,
        use_scale_shift_norm=unet.scale_shift_norm,
        clip_dim=embed_dim,
        clip_emb_mult=context // width,
        xf_width=width,
        text_ctx=clip.config.context_length,
    )
    caption = ClipCaptionConfig(encoder=clip.config, width=width)
    config = checked(
        "decoder",
        DecoderStageConfig,
        {
            "model": {
                "unet": unet.to_dict(),
                "clip_text": caption.to_dict(),
                "embed_dim": embed_dim,
                "num_image_tokens": context // width,
            },
            "diffusion": DiffusionConfig(variance_type="learned_range", clip_sample_range=1.0).to_dict(),
            "sampling": SamplingConfig(num_inference_steps=50, guidance_scale=8.0).to_dict(),
            "unit_norm": False,
            "image_size": _DECODER_SIZE,
        },
    )
    entries = prefixed(decoder_entries(shapes_of(config), config.model), theirs="model.")
    return _with_tower(config, clip, "conditioners.text.encoder.tower.", "Karlo's decoder", entries, theirs)


def _upsampler(theirs: Tensors, settings: Mapping[str, Any]) -> ImportedStage:
    shapes = shapes_in(theirs)
    networks = {"unet.": "model_first_steps.", "last_unet.": "model_last_step."}
    first, last = (
        unet_config(within(shapes, prefix), image_size=_UPSAMPLER_SIZE, head_channels=_HEAD_WIDTH)
        for prefix in networks.values()
    )
    if first != last:
        raise InteropError("model_last_step: its shape is not that of model_first_steps")
    _compare(
        "upsampler", settings, channels=first.channels, depth=first.depth, channels_multiple=list(first.channel_mult)
    )
    config = checked(
        "upsampler_256",
        UpsamplerStageConfig,
        {
            "kind": "upsampler_256",
            "model": UpsamplerConfig(unet=first, resize="bicubic", last_step=True).to_dict(),
            "diffusion": DiffusionConfig(variance_type="fixed_small", clip_sample_range=1.0).to_dict(),
            "sampling": SamplingConfig(num_inference_steps=7).to_dict(),
            "low_res_size": _DECODER_SIZE,
            "image_size": _UPSAMPLER_SIZE,
        },
    )
    ours = shapes_of(config)
    entries = [
        entry
        for mine, its in networks.items()
        for entry in prefixed(unet_entries(within(ours, mine), first), ours=mine, theirs=its)
    ]
    tensors, account = to_ours("Karlo's improved upsampler", entries, theirs, ours)
    return ImportedStage(config, tensors, None, (account,))


def _with_tower(
    config: StageConfig, clip: _Clip, prefix: str, part: str, entries: list[Entry], theirs: Tensors
) -> ImportedStage:
    """A stage of `theirs` and of CLIP's text transformer, which is in it under `prefix`."""
    shapes = shapes_of(config)
    tower, text_account = clip.tower(shapes, prefix)
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
    tensors, account = to_ours(part, entries, theirs, rest)
    return ImportedStage(config, {**tensors, **tower}, clip.reference, (account, text_account))


def _file(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise InteropError(
            f"{str(folder)!r}: has {len(found)} files {pattern}: {', '.join(path.name for path in found)}"
        )
    return found[0] if found else None


def _statistics(path: Path) -> dict[str, list[float]]:
    """Mean and deviation by which the prior's embeddings are whitened."""
    content = read_content(path)
    if (
        not isinstance(content, tuple | list)
        or len(content) != 2
        or not all(isinstance(part, torch.Tensor) and part.ndim == 1 for part in content)
    ):
        raise InteropError(f"{str(path)!r}: expected two vectors, mean and deviation")
    return dict(zip(("mean", "std"), (part.double().tolist() for part in content), strict=True))


def _settings(folder: Path) -> dict[str, Any]:
    """Karlo's YAML files that are there, by the part that they are about."""
    found = {}
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("configs/*.yaml")]):
        content = read_settings(path)
        model = content.get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        if kind in _YAML_KINDS:
            found[_YAML_KINDS[kind]] = content
    return found


def _compare(part: str, settings: Mapping[str, Any], **ours: object) -> None:
    """Raises `InteropError` where a YAML file says something else than the weights, or than is known of the published models."""
    content = settings.get(part)
    if content is None:
        return
    said = {**content.get("model", {}).get("hparams", {}), **content.get("diffusion", {})}
    for name, value in {**ours, **_SCHEDULE, **_DIFFUSION[part]}.items():
        if name in said and said[name] != value:
            raise InteropError(f"{part}: {name} = {said[name]!r} in its YAML file: {value!r} is what can be taken over")


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise InteropError(f"{name} is missing: this is none of Karlo's files")
    return shapes[name]
