"""Small folders in Karlo's format with random weights, made by diffusers and transformers alone."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

EMBED_DIM, LENGTH, TOKENS, CONTEXT = 16, 12, 3, 24
SIZE, LARGE, CLIP_SIZE = 16, 32, 16
# The narrowest at which ours too has 32 groups in all layers.
WIDTHS = (128, 256)


def make_karlo(folder: Path, *, prior: bool = True, image_encoder: bool = True, seed: int = 0) -> Path:
    """A whole folder: `UnCLIPPipeline` with a prior, else `UnCLIPImageVariationPipeline`."""
    torch.manual_seed(seed)
    parts: dict[str, nn.Module] = {
        "decoder": UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            block_out_channels=WIDTHS,
            layers_per_block=1,
            cross_attention_dim=CONTEXT,
            attention_head_dim=64,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        ),
        "text_proj": UnCLIPTextProjModel(
            clip_extra_context_tokens=TOKENS,
            clip_embeddings_dim=EMBED_DIM,
            time_embed_dim=4 * WIDTHS[0],
            cross_attention_dim=CONTEXT,
        ),
        "super_res_first": _super_res(),
        "super_res_last": _super_res(),
        "text_encoder": CLIPTextModelWithProjection(text_config()),
    }
    if prior:
        parts["prior"] = PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            embedding_dim=EMBED_DIM,
            num_embeddings=LENGTH,
        )
    if image_encoder:
        parts["image_encoder"] = CLIPVisionModelWithProjection(vision_config())
        CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=CLIP_SIZE).save_pretrained(
            folder / "feature_extractor"
        )
    for name, part in parts.items():
        randomize(part)
        if name == "decoder":
            _bound_variance(part)
        part.save_pretrained(folder / name)
    for name, settings in {
        "prior_scheduler": {"prediction_type": "sample", "clip_sample_range": 5.0},
        "decoder_scheduler": {"variance_type": "learned_range"},
        "super_res_scheduler": {},
    }.items():
        if prior or name != "prior_scheduler":
            UnCLIPScheduler(**settings).save_pretrained(folder / name)
    make_tokenizer(folder / "tokenizer")
    kind = "UnCLIPPipeline" if prior else "UnCLIPImageVariationPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=EMBED_DIM,
        intermediate_size=4 * EMBED_DIM,
        projection_dim=EMBED_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=96,
        projection_dim=EMBED_DIM,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=CLIP_SIZE,
        patch_size=8,
    )


def make_tokenizer(folder: Path) -> None:
    """CLIP's byte-pair encoding as transformers writes it."""
    source = folder.with_name("byte_pairs")
    source.mkdir(parents=True, exist_ok=True)
    ours = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (source / "vocab.json").write_text(json.dumps({names.get(key, key): token for key, token in ours.encoder.items()}))
    merges = sorted(ours.bpe_ranks, key=ours.bpe_ranks.__getitem__)
    (source / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    CLIPTokenizer.from_pretrained(source, model_max_length=LENGTH, pad_token="<|endoftext|>").save_pretrained(folder)
    for path in source.iterdir():
        path.unlink()
    source.rmdir()


def randomize(model: nn.Module) -> None:
    """Every parameter drawn, those that begin as zeros or ones too, on a scale that keeps activations in bounds."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name not in ("clip_mean", "clip_std"):
                parameter.copy_(torch.randn(parameter.shape) * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(
                    1 + 0.2 * torch.randn(parameter.shape) if "std" in name else 0.2 * torch.randn(parameter.shape)
                )
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1)


def _bound_variance(decoder: UNet2DConditionModel) -> None:
    """Keeps the variance between its bounds, as training does: beyond them our sampler clamps it, and theirs does not."""
    with torch.no_grad():
        for parameter in decoder.conv_out.parameters():
            parameter[3:] *= 0.1


def _super_res() -> UNet2DModel:
    return UNet2DModel(
        sample_size=LARGE,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(128, 128),
        layers_per_block=1,
        add_attention=False,
    )
