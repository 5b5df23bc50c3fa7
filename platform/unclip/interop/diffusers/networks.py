"""Which tensor of diffusers' networks is which of ours: `PriorTransformer`, `UNet2DConditionModel`, `UNet2DModel`,
`UnCLIPTextProjModel`."""

from __future__ import annotations

from unclip.interop.keys import Entry, layer, packed_heads, prefixed, reshaped, same, tokens_fastest
from unclip.models.prior import PriorTransformerConfig
from unclip.models.unet import UNetConfig

_STEP_TOKENS = 4  # text embedding, timestep, noised image embedding, query


def prior_entries(config: PriorTransformerConfig) -> list[Entry]:
    """`PriorTransformer` without its statistics and without what makes the caption's states fit it."""
    length, width = config.context_length + _STEP_TOKENS, config.width
    found = [
        *reshaped("positional_embedding", "positional_embedding", (length, width), (1, length, width)),
        *reshaped("query", "prd_embedding", (width,), (1, 1, width)),
        *layer("time_embed.layers.0", "time_embedding.linear_1"),
        *layer("time_embed.layers.2", "time_embedding.linear_2"),
        *layer("image_embed_in", "proj_in"),
        *layer("prefix.text_embed_in", "embedding_proj"),
        *layer("transformer.final_norm", "norm_out"),
        *layer("image_embed_out", "proj_to_clip_embeddings"),
    ]
    block = [
        *layer("attention_norm", "norm1"),
        *packed_heads("qkv", [f"attn1.to_{part}" for part in "qkv"], config.heads),
        *layer("attention_out", "attn1.to_out.0"),
        *layer("mlp_norm", "norm3"),
        *layer("mlp_in", "ff.net.0.proj"),
        *layer("mlp_out", "ff.net.2"),
    ]
    for index in range(config.depth):
        found += prefixed(block, ours=f"transformer.blocks.{index}.", theirs=f"transformer_blocks.{index}.")
    return found


def caption_entries() -> list[Entry]:
    """What makes the states of CLIP's text transformer fit a `PriorTransformer`."""
    return layer("prefix.states_in", "encoder_hidden_states_proj")


def unet_entries(config: UNetConfig) -> list[Entry]:
    """A U-Net: `UNet2DConditionModel` where it has attention, else `UNet2DModel`."""
    found = [
        *layer("time_embed.layers.0", "time_embedding.linear_1"),
        *layer("time_embed.layers.2", "time_embedding.linear_2"),
        *layer("stem", "conv_in"),
        *layer("head_norm", "conv_norm_out"),
        *layer("head", "conv_out"),
    ]
    widths, levels = config.widths, len(config.widths)
    skips, current, place = [widths[0]], widths[0], 0
    for level, width in enumerate(widths):
        theirs = f"down_blocks.{level}"
        for index in range(config.depth):
            found += _residual(f"down.{place}.residual", f"{theirs}.resnets.{index}", skip=current != width)
            found += _attention(f"down.{place}.attention", f"{theirs}.attentions.{index}", config, level)
            current, place = width, place + 1
            skips.append(width)
        if level < levels - 1:
            found += _residual(f"down.{place}.residual", f"{theirs}.downsamplers.0", skip=False)
            place += 1
            skips.append(width)
    for index in range(2):
        found += _residual(f"middle.{index}.residual", f"mid_block.resnets.{index}", skip=False)
    if config.attention_resolutions:
        found += _attention("middle.0.attention", "mid_block.attentions.0", config, levels - 1, attends=True)
    place = 0
    for level in reversed(range(levels)):
        theirs, width = f"up_blocks.{levels - 1 - level}", widths[level]
        for index in range(config.depth + 1):
            skip = current + skips.pop() != width
            found += _residual(f"up.{place}.residual", f"{theirs}.resnets.{index}", skip=skip)
            found += _attention(f"up.{place}.attention", f"{theirs}.attentions.{index}", config, level)
            if level and index == config.depth:
                found += _residual(f"up.{place}.resample", f"{theirs}.upsamplers.0", skip=False)
            current, place = width, place + 1
    return found


def text_proj_entries(num_tokens: int) -> list[Entry]:
    """`UnCLIPTextProjModel` and our decoder's conditioners."""
    return [
        *same("image.null_embed", "learned_classifier_free_guidance_embeddings"),
        *layer("image.to_time", "clip_image_embeddings_project_to_time_embeddings"),
        *tokens_fastest("image.to_tokens", "clip_extra_context_tokens_proj", num_tokens),
        *layer("text.to_time", "embedding_proj"),
        *layer("text.to_context", "encoder_hidden_states_proj"),
        *layer("text.norm", "text_encoder_hidden_states_norm"),
    ]


def _residual(ours: str, theirs: str, *, skip: bool) -> list[Entry]:
    names = {
        "norm_in": "norm1",
        "conv_in": "conv1",
        "embedding": "time_emb_proj",
        "norm_out": "norm2",
        "conv_out": "conv2",
    }
    names |= {"skip": "conv_shortcut"} if skip else {}
    return [entry for mine, its in names.items() for entry in layer(f"{ours}.{mine}", f"{theirs}.{its}")]


def _attention(ours: str, theirs: str, config: UNetConfig, level: int, *, attends: bool = False) -> list[Entry]:
    """Attention with a context, where the level has any."""
    if not (attends or config.attends(level)):
        return []
    heads = config.widths[level] // config.head_channels
    return [
        *layer(f"{ours}.norm", f"{theirs}.group_norm"),
        *packed_heads(f"{ours}.qkv", [f"{theirs}.to_{part}" for part in "qkv"], heads),
        *packed_heads(f"{ours}.context_kv", [f"{theirs}.add_{part}_proj" for part in "kv"], heads),
        *layer(f"{ours}.out", f"{theirs}.to_out.0"),
    ]
