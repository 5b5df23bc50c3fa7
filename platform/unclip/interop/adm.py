"""ADM (openai/guided-diffusion): its diffusion models as decoders of classes, its noised classifier as ours.

Weights alone do not say how a model was built: how wide a head of attention is, how heads are packed, the side of the
pictures, the schedule of the noise. So these are taken as its scripts take them, `MODEL_FLAGS` in its README, and what the
weights do say is held against them. Its upsamplers have attention, and ours are convolutions alone (unCLIP, section 2.1), so
they are refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import SamplingConfig
from unclip.interop.adm_names import by_head, encoder_config, projection, unet_config, unet_entries
from unclip.interop.base import ImportedStage, Source, shapes_of
from unclip.interop.keys import Account, Entry, InteropError, Shapes, layer, prefixed, to_ours
from unclip.interop.torch_files import read_tensors, shapes_in
from unclip.models.classifier import ClassifierConfig
from unclip.models.decoder import DecoderConfig
from unclip.models.unet import UNetConfig
from unclip.pipelines.stages import ClassifierStageConfig, DecoderStageConfig

_CLASS_COLUMN = "class"
_ONLY_CLASS = "any"
_TABLE = "conditioners.label.vectors.weight"
_POOL = "out.2."
_SIDES = r"^\d+(,\d+)*$"
_CLASSIFIER_HEAD_WIDTH = 64
"""As guided-diffusion's scripts build every classifier."""
_SAID_BY_WEIGHTS = {
    "resblock_updown",
    "classifier_resblock_updown",
    "classifier_pool",
    "use_fp16",
    "classifier_use_fp16",
}
"""Flags that are in published lists; another way of resampling or pooling has weights of other names."""


class AdmFlags(Config):
    """The options of guided-diffusion's scripts, under its names and with its defaults; those of its data and runs it has not."""

    image_size: int = Field(default=64, ge=1)
    """side of the pictures in pixels"""
    num_heads: int = Field(default=4, ge=1)
    """heads of every attention, where num_head_channels is -1"""
    num_head_channels: int = -1
    """width of a head; -1: there are num_heads"""
    use_new_attention_order: bool = False
    """whether the queries of all heads come first, then all keys, then all values"""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """how the noise grows"""
    diffusion_steps: int = Field(default=1000, ge=1)
    """steps of the forward process"""
    learn_sigma: bool = False
    """whether the model also puts out the variance"""
    sigma_small: bool = False
    """with a variance that is not learned: the posterior's; else beta"""
    predict_xstart: bool = False
    """whether the model predicts the picture; else the noise"""
    rescale_timesteps: bool = False
    """whether the model is told timesteps times 1000 / diffusion_steps"""
    class_cond: bool = False
    """whether the model is told classes"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """share of activations dropped in training"""
    num_channels: int | None = None
    """base width; null: as the weights say"""
    num_res_blocks: int | None = None
    """residual blocks of a level; null: as the weights say"""
    attention_resolutions: str | None = Field(default=None, pattern=_SIDES)
    """sides of the feature maps with attention; null: as the weights say"""
    use_scale_shift_norm: bool | None = None
    """whether the time embedding scales and shifts; null: as the weights say"""
    classifier_depth: int = Field(default=2, ge=1)
    """residual blocks of a level of a classifier"""
    classifier_width: int | None = None
    """base width of a classifier; null: as the weights say"""
    classifier_attention_resolutions: str | None = Field(default=None, pattern=_SIDES)
    """of a classifier; null: as the weights say"""
    classifier_use_scale_shift_norm: bool | None = None
    """of a classifier; null: as the weights say"""

    @classmethod
    def parse(cls, flags: str) -> AdmFlags:
        """Of `--name value --name value`; `InteropError` names a flag that is unknown or has a bad value."""
        try:
            words = shlex.split(flags)
        except ValueError as error:
            raise InteropError(f"flags = {flags!r}: {error}") from None
        names, values = words[::2], words[1::2]
        bad = [name for name in names if not name.startswith("--")]
        if bad or len(names) != len(values):
            raise InteropError(f"flags = {flags!r}: expected --name value pairs, found {(bad or names[-1:])[0]!r}")
        given = {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}
        for name in _SAID_BY_WEIGHTS & given.keys():
            del given[name]
        try:
            return cls.from_dict(given)
        except ConfigError as error:
            raise InteropError(f"flags = {flags!r}: {error}") from None

    @property
    def diffusion(self) -> DiffusionConfig:
        """The process that it reverses."""
        if self.rescale_timesteps and self.diffusion_steps != 1000:
            raise InteropError(
                f"flags: rescale_timesteps with diffusion_steps = {self.diffusion_steps}: ours are told timesteps"
            )
        fixed: Literal["fixed_small", "fixed_large"] = "fixed_small" if self.sigma_small else "fixed_large"
        return DiffusionConfig(
            beta_schedule="linear" if self.noise_schedule == "linear" else "squaredcos_cap_v2",
            num_train_timesteps=self.diffusion_steps,
            prediction_type="sample" if self.predict_xstart else "epsilon",
            variance_type="learned_range" if self.learn_sigma else fixed,
            clip_sample_range=1.0,
        )

    def head_width(self, shapes: Shapes) -> int:
        """Width of a head of every attention; `InteropError` where it differs between them."""
        if self.num_head_channels != -1:
            return self.num_head_channels
        widths = {shape[0] // 3 for name, shape in shapes.items() if name.endswith(".qkv.weight")}
        if len(widths) > 1:
            raise InteropError(
                f"flags: num_heads = {self.num_heads} for attention of widths {sorted(widths)}: heads of different widths, "
                "ours have one; set num_head_channels where the model has that"
            )
        return max(1, widths.pop() // self.num_heads) if widths else 1


def import_adm(source: Source) -> Iterator[ImportedStage]:
    """The decoder or the classifier in one of ADM's files; see `Importer`."""
    theirs = read_tensors(Path(source.path))
    shapes, flags = shapes_in(theirs), AdmFlags.parse(source.flags)
    if any(name.startswith("output_blocks.") for name in shapes):
        yield _decoder(theirs, shapes, flags)
    else:
        yield _classifier(theirs, shapes, flags)


def _decoder(theirs: Mapping[str, torch.Tensor], shapes: Shapes, flags: AdmFlags) -> ImportedStage:
    unet = unet_config(shapes, image_size=flags.image_size, head_channels=flags.head_width(shapes))
    if unet.in_channels != 3:
        raise InteropError(
            f"input_blocks.0.0.weight: {unet.in_channels} channels are those of an upsampler or of inpainting; ADM's upsamplers "
            "have attention, and ours are convolutions alone"
        )
    _compare(
        {
            "class_cond": (flags.class_cond, "label_emb.weight" in shapes),
            "learn_sigma": (flags.learn_sigma, unet.out_channels == 6),
            "num_channels": (flags.num_channels, unet.channels),
            "num_res_blocks": (flags.num_res_blocks, unet.depth),
            "attention_resolutions": _sides(flags.attention_resolutions, unet),
            "use_scale_shift_norm": (flags.use_scale_shift_norm, unet.scale_shift_norm),
        }
    )
    classes = tuple(map(str, range(shapes["label_emb.weight"][0]))) if flags.class_cond else (_ONLY_CLASS,)
    config = DecoderStageConfig(
        model=DecoderConfig(unet=unet.merged({"dropout": flags.dropout}), num_classes=len(classes)),
        diffusion=flags.diffusion,
        sampling=SamplingConfig(sampler="ddpm", num_inference_steps=min(250, flags.diffusion_steps)),
        label_column=_CLASS_COLUMN,
        classes=classes,
        image_size=flags.image_size,
    )
    ours = shapes_of(config)
    names = [name.removeprefix("unet.") for name in ours if name.startswith("unet.")]
    entries = prefixed(unet_entries(names, unet, new_attention_order=flags.use_new_attention_order), ours="unet.")
    tensors, account = to_ours("ADM's model", [*entries, _classes(ours, class_cond=flags.class_cond)], theirs, ours)
    return ImportedStage(config, tensors, None, (account, _without_null_class()))


def _classes(ours: Shapes, *, class_cond: bool) -> Entry:
    """A vector a class, and last the null class's, which ADM has not: zeros."""
    rows, width = ours[_TABLE]
    if not class_cond:
        return Entry(_TABLE, (), lambda _: torch.zeros(rows, width), lambda _: ())
    return Entry(
        _TABLE,
        ("label_emb.weight",),
        lambda found: torch.cat([found[0], found[0].new_zeros(1, width)]),
        lambda tensor: (tensor[:-1],),
    )


def _without_null_class() -> Account:
    reason = "ADM has no null class; its vector is zero here, and guidance_scale has to stay 1 (a classifier may guide)"
    return Account("settings of ADM's model", taken=0, made=0, dropped={"classifier-free guidance": reason})


def _classifier(theirs: Mapping[str, torch.Tensor], shapes: Shapes, flags: AdmFlags) -> ImportedStage:
    encoder = encoder_config(
        shapes,
        image_size=flags.image_size,
        head_channels=_CLASSIFIER_HEAD_WIDTH,
        depth=flags.classifier_depth,
    )
    _compare(
        {
            "classifier_width": (flags.classifier_width, encoder.channels),
            "classifier_attention_resolutions": _sides(flags.classifier_attention_resolutions, encoder),
            "classifier_use_scale_shift_norm": (flags.classifier_use_scale_shift_norm, encoder.scale_shift_norm),
        },
    )
    for name in ("qkv_proj.weight", "qkv_proj.bias", "c_proj.weight"):
        if f"{_POOL}{name}" not in shapes:
            raise InteropError(f"{_POOL}{name} is missing: ours pools by attention (classifier_pool = attention)")
    classes = tuple(map(str, range(shapes[f"{_POOL}c_proj.weight"][0])))
    config = ClassifierStageConfig(
        model=ClassifierConfig(encoder=encoder),
        diffusion=flags.diffusion,
        label_column=_CLASS_COLUMN,
        classes=classes,
    )
    ours = shapes_of(config)
    heads = encoder.widths[-1] // encoder.head_channels
    trunk = [name for name in ours if not name.startswith(("pool.", "norm."))]
    entries = [*unet_entries(trunk, encoder), *layer("norm", "out.0"), *_pool_entries(heads)]
    tensors, account = to_ours("ADM's classifier", entries, _with_parted_pool(theirs), ours)
    return ImportedStage(config, tensors, None, (account,))


def _with_parted_pool(theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pool's query, which ours asks of the mean alone, apart from its keys and values."""
    parted = dict(theirs)
    for kind in ("weight", "bias"):
        packed = parted.pop(f"{_POOL}qkv_proj.{kind}")
        width = len(packed) // 3
        parted |= {f"{_POOL}qkv_proj[q].{kind}": packed[:width], f"{_POOL}qkv_proj[kv].{kind}": packed[width:]}
    return parted


def _pool_entries(heads: int) -> list[Entry]:
    return [
        Entry(
            "pool.positions",
            (f"{_POOL}positional_embedding",),
            lambda found: found[0].T,
            lambda tensor: (tensor.T,),
        ),
        *projection("pool.query", f"{_POOL}qkv_proj[q]"),
        *projection("pool.key_value", f"{_POOL}qkv_proj[kv]", by_head(2, heads)),
        *projection("pool.out", f"{_POOL}c_proj"),
    ]


def _compare(said: Mapping[str, tuple[object, object]]) -> None:
    """Raises `InteropError` where a flag that was given (flag, what the weights say) says something else than the weights."""
    for name, (flag, weights) in said.items():
        if flag is not None and flag != weights:
            raise InteropError(f"flags: {name} = {flag}, but the weights say {weights}")


def _sides(flag: str | None, unet: UNetConfig) -> tuple[object, object]:
    return None if flag is None else sorted(map(int, flag.split(","))), sorted(unet.attention_resolutions)
