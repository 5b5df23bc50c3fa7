"""The decoder and diffusers' UnCLIP decoder (Karlo's layout, scaled down) with the same random weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import nn

from unclip.models.conditioners import ImageCondition, TextStatesCondition, TextStatesConfig
from unclip.models.decoder import DecoderCondition, DecoderConfig, DecoderModel
from unclip.models.unet import ResidualBlock, SpatialAttention, UNet, UNetConfig

WIDTH, TOKENS, LENGTH, CLIP = 24, 4, 7, 10
RESIDUAL = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "embedding": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}


def make_config(scale_shift_norm: bool) -> DecoderConfig:
    unet = UNetConfig(
        out_channels=6,
        channels=128,  # the narrowest at which 32 groups hold four channels, as diffusers has 32 in all layers
        channel_mult=(1, 2, 3),
        depth=1,
        attention_resolutions=(8, 4),
        head_channels=64,
        scale_shift_norm=scale_shift_norm,
        image_size=16,
    )
    states = TextStatesConfig(context_length=LENGTH, state_dim=CLIP, width=WIDTH)
    return DecoderConfig(unet=unet, text_states=states, embed_dim=CLIP, num_image_tokens=TOKENS)


def make_diffusers_unet(config: UNetConfig) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=config.image_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=config.widths,
        layers_per_block=config.depth,
        cross_attention_dim=WIDTH,
        attention_head_dim=config.head_channels,
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
        class_embed_type="identity",
    ).eval()


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def same_layout(ours: UNet, theirs: UNet2DConditionModel) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules of both nets, except attention, that must hold the same weights."""
    yield ours.stem, theirs.conv_in
    yield ours.time_embed.layers[0], theirs.time_embedding.linear_1
    yield ours.time_embed.layers[2], theirs.time_embedding.linear_2
    yield ours.head_norm, theirs.conv_norm_out
    yield ours.head, theirs.conv_out
    other = []
    for block in theirs.down_blocks:
        other += [*block.resnets, *(block.downsamplers or [])]
    other += list(theirs.mid_block.resnets)
    for block in theirs.up_blocks:
        other += [*block.resnets, *(block.upsamplers or [])]
    own = [module for module in ours.modules() if isinstance(module, ResidualBlock)]
    for mine, its in zip(own, other, strict=True):
        yield from ((getattr(mine, a), getattr(its, b)) for a, b in RESIDUAL.items() if getattr(its, b) is not None)


def copy_attention(mine: SpatialAttention, its: nn.Module) -> None:
    """Ours packs query, key and value head by head, as GLIDE and Karlo do; diffusers has a layer for each."""
    its.group_norm.load_state_dict(mine.norm.state_dict())
    its.to_out[0].load_state_dict(mine.out.state_dict())
    assert mine.context_kv is not None
    for packed, layers in (
        (mine.qkv, (its.to_q, its.to_k, its.to_v)),
        (mine.context_kv, (its.add_k_proj, its.add_v_proj)),
    ):
        weights = packed.weight.unflatten(0, (mine.heads, len(layers), -1)).unbind(dim=1)
        biases = packed.bias.unflatten(0, (mine.heads, len(layers), -1)).unbind(dim=1)
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            layer.load_state_dict({"weight": weight.flatten(0, 1), "bias": bias.flatten()})


def copy_unet(ours: UNet, theirs: UNet2DConditionModel) -> None:
    for mine, its in same_layout(ours, theirs):
        its.load_state_dict(mine.state_dict())
    blocks = [*theirs.down_blocks, theirs.mid_block, *theirs.up_blocks]
    other = [attention for block in blocks for attention in getattr(block, "attentions", [])]
    own = [module for module in ours.modules() if isinstance(module, SpatialAttention)]
    for mine, its in zip(own, other, strict=True):
        copy_attention(mine, its)


def make_text_proj(ours: DecoderModel) -> UnCLIPTextProjModel:
    image, text = ours.conditioners["image"], ours.conditioners["text"]
    theirs = UnCLIPTextProjModel(
        clip_extra_context_tokens=TOKENS,
        clip_embeddings_dim=CLIP,
        time_embed_dim=ours.config.unet.embedding_dim,
        cross_attention_dim=WIDTH,
    ).eval()
    theirs.embedding_proj.load_state_dict(text.to_time.state_dict())
    theirs.clip_image_embeddings_project_to_time_embeddings.load_state_dict(image.to_time.state_dict())
    theirs.encoder_hidden_states_proj.load_state_dict(text.to_context.state_dict())
    theirs.text_encoder_hidden_states_norm.load_state_dict(text.norm.state_dict())
    # Theirs: the token varies fastest; ours: the channel.
    weight = image.to_tokens.weight.unflatten(0, (TOKENS, WIDTH)).transpose(0, 1).flatten(0, 1)
    bias = image.to_tokens.bias.unflatten(0, (TOKENS, WIDTH)).T.flatten()
    theirs.clip_extra_context_tokens_proj.load_state_dict({"weight": weight, "bias": bias})
    return theirs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_decoder_equals_diffusers(scale_shift_norm: bool, masked: bool) -> None:
    ours = make_config(scale_shift_norm).build().eval()
    randomize(ours)
    unet, text_proj = make_diffusers_unet(ours.config.unet), make_text_proj(ours)
    copy_unet(ours.unet, unet)
    assert sum(p.numel() for p in ours.unet.parameters()) == sum(p.numel() for p in unet.parameters())

    generator = torch.Generator().manual_seed(1)
    x_t, timesteps = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([17, 999])
    embed, states = torch.randn(2, CLIP, generator=generator), torch.randn(2, LENGTH, CLIP, generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([[3], [LENGTH]]) if masked else torch.ones(2, LENGTH, dtype=torch.bool)
    kept = torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        context, embedding = text_proj(
            image_embeddings=embed,
            prompt_embeds=states[torch.arange(2), mask.sum(dim=1) - 1],
            text_encoder_hidden_states=states,
            do_classifier_free_guidance=False,
        )
        attention_mask = nn.functional.pad(mask, (TOKENS, 0), value=True).float()
        expected = unet(
            x_t, timesteps, encoder_hidden_states=context, class_labels=embedding, attention_mask=attention_mask
        ).sample
        cond = DecoderCondition(
            image=ImageCondition(dropped=kept, embed=embed),
            text=TextStatesCondition(dropped=kept, states=states, mask=mask),
        )
        output = ours(x_t, timesteps, cond)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
