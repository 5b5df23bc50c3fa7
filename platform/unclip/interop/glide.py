"""GLIDE's text-to-image model (openai/glide-text2im: `base.pt`, `base_inpaint.pt`) as a decoder that is told captions alone.

Its captions are tokens of GPT-2's byte-pair encoding, not of CLIP's. The decoder computes what the original does for the same
tokens, but nothing here makes them of text, so `plan_cascade` refuses it for prompts. Its upsampler is told captions as well,
and ours is not (unCLIP, section 2.1), so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.samplers import SamplingConfig
from unclip.interop.adm_names import transformer_depth, transformer_entries, unet_config, unet_entries
from unclip.interop.base import ImportedStage, Source, shapes_of
from unclip.interop.keys import Entry, InteropError, Shapes, layer, prefixed, same, to_ours
from unclip.interop.torch_files import read_tensors, shapes_in
from unclip.models.decoder import DecoderConfig
from unclip.models.text import TextTransformerConfig
from unclip.pipelines.stages import DecoderStageConfig

_IMAGE_SIZE, _HEAD_WIDTH = 64, 64
_IN_CHANNELS = {3: False, 7: True}
"""Of the input: whether the model sees the known part of a picture, 3 masked channels and the mask."""
_UPSAMPLER_CHANNELS = (6, 10)


def import_glide(source: Source) -> Iterator[ImportedStage]:
    """The decoder in one of GLIDE's files; see `Importer`."""
    theirs = read_tensors(Path(source.path))
    shapes = shapes_in(theirs)
    config = DecoderStageConfig(
        model=decoder_config(shapes),
        diffusion=DiffusionConfig(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="epsilon",
            variance_type="learned_range",
            clip_sample_range=1.0,
        ),
        sampling=SamplingConfig(sampler="ddpm", num_inference_steps=100, guidance_scale=3.0),
        image_size=_IMAGE_SIZE,
    )
    ours = shapes_of(config)
    tensors, account = to_ours("GLIDE's decoder", decoder_entries(ours, config.model), theirs, ours)
    yield ImportedStage(config, tensors, None, (account,))


def decoder_config(shapes: Shapes) -> DecoderConfig:
    """The decoder whose weights have `shapes`; `InteropError` where it has parts that ours has not."""
    if "transformer_proj.weight" not in shapes:
        raise InteropError(
            "transformer_proj.weight is missing: GLIDE's models are told captions; kind=adm takes those that are not"
        )
    stem = shapes.get("input_blocks.0.0.weight", (0, 0))[1]
    if stem in _UPSAMPLER_CHANNELS:
        raise InteropError(
            f"input_blocks.0.0.weight: {stem} channels are those of GLIDE's upsampler, which is told captions; ours is not"
        )
    if stem not in _IN_CHANNELS:
        raise InteropError(f"input_blocks.0.0.weight: {stem} channels are those of none of GLIDE's models")
    if "unemb.weight" in shapes:
        raise InteropError("unemb.weight: a text transformer that also predicts tokens (xf_ar) is none of ours")
    return DecoderConfig(
        unet=unet_config(shapes, image_size=_IMAGE_SIZE, head_channels=_HEAD_WIDTH),
        text=_text_config(shapes),
        inpainting=_IN_CHANNELS[stem],
    )


def decoder_entries(ours: Shapes, config: DecoderConfig) -> list[Entry]:
    """The map of all parameters `ours` of a decoder with GLIDE's text transformer."""
    text, transformer = "conditioners.text.", "conditioners.text.transformer."
    unet = [name.removeprefix("unet.") for name in ours if name.startswith("unet.")]
    entries = prefixed(unet_entries(unet, config.unet), ours="unet.")
    for name in ("token_embedding.weight", "positional_embedding", "padding_embedding"):
        entries += same(transformer + name, name)
    entries += layer(f"{transformer}transformer.final_norm", "final_ln")
    entries += layer(f"{text}to_time", "transformer_proj")
    assert config.text is not None
    blocks = transformer_entries(config.text.depth)
    entries += prefixed(blocks, ours=f"{transformer}transformer.", theirs="transformer.")
    return entries


def _text_config(shapes: Shapes) -> TextTransformerConfig:
    for name in ("padding_embedding", "final_ln.weight", "token_embedding.weight"):
        if name not in shapes:
            raise InteropError(f"{name} is missing: ours has one")
    vocab_size, width = shapes["token_embedding.weight"]
    return TextTransformerConfig(
        vocab_size=vocab_size,
        context_length=shapes["padding_embedding"][0],
        width=width,
        depth=transformer_depth(shapes),
        heads=max(1, width // _HEAD_WIDTH),
        pooling="last_position",
    )
