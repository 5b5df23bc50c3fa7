"""The decoder and diffusers' UnCLIP decoder (Karlo's layout, scaled down) with the same random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import nn

from unclip.interop.diffusers.networks import text_proj_entries, unet_entries
from unclip.interop.keys import to_theirs
from unclip.models.conditioners import ImageCondition, TextStatesCondition, TextStatesConfig
from unclip.models.decoder import DecoderCondition, DecoderConfig, DecoderModel
from unclip.models.unet import UNetConfig

WIDTH, TOKENS, LENGTH, CLIP = 24, 4, 7, 10


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


def their_unet(ours: DecoderModel) -> UNet2DConditionModel:
    theirs = make_diffusers_unet(ours.config.unet)
    theirs.load_state_dict(to_theirs("decoder", unet_entries(ours.config.unet), ours.unet.state_dict())[0])
    return theirs


def make_text_proj(ours: DecoderModel) -> UnCLIPTextProjModel:
    theirs = UnCLIPTextProjModel(
        clip_extra_context_tokens=TOKENS,
        clip_embeddings_dim=CLIP,
        time_embed_dim=ours.config.unet.embedding_dim,
        cross_attention_dim=WIDTH,
    ).eval()
    state = {name: tensor for name, tensor in ours.conditioners.state_dict().items() if name != "text.null_state"}
    theirs.load_state_dict(to_theirs("text_proj", text_proj_entries(TOKENS), state)[0])
    return theirs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_decoder_equals_diffusers(scale_shift_norm: bool, masked: bool) -> None:
    ours = make_config(scale_shift_norm).build().eval()
    randomize(ours)
    unet, text_proj = their_unet(ours), make_text_proj(ours)
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
