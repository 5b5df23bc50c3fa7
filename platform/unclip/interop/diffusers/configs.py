"""What diffusers' `config.json` say of Karlo's networks, and which of our configurations that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unclip.interop.keys import InteropError
from unclip.interop.settings import Settings, checked
from unclip.models.clip_text import ClipTextConfig
from unclip.models.layers import group_norm
from unclip.models.prior import PriorConfig
from unclip.models.unet import UNetConfig

_GROUPS = 32
_DOWN, _UP = (
    ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
)
_MIDDLE, _PLAIN_MIDDLE = "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D"
_PRIOR: dict[str, Any] = {
    "additional_embeddings": 4,
    "dropout": 0.0,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "time_embed_dim": None,
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
_UNET: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": _GROUPS,
    "num_class_embeds": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}
_CONDITIONED: dict[str, Any] = {
    **_UNET,
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embed_type": "identity",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": _MIDDLE,
    "num_attention_heads": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}
_UNCONDITIONED: dict[str, Any] = {
    **_UNET,
    "add_attention": False,
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_type": _PLAIN_MIDDLE,
    "num_train_timesteps": None,
    "upsample_type": "conv",
}


_UNET_DEFAULTS: dict[str, Any] = {"dropout": 0.0, "resnet_time_scale_shift": "default", "attention_head_dim": 8}
_DEFAULTS: Mapping[bool, dict[str, Any]] = {  # of diffusers, where they are not what Karlo has
    True: {**_UNET_DEFAULTS, "class_embed_type": None, "mid_block_type": "UNetMidBlock2DCrossAttn"},
    False: {**_UNET_DEFAULTS, "add_attention": True},
}
"""Of `UNet2DConditionModel`, and of `UNet2DModel`."""


def prior_config(settings: Mapping[str, Any], text: ClipTextConfig) -> PriorConfig:
    """Of a `PriorTransformer` behind the text transformer `text`."""
    left = Settings("prior", settings)
    heads, head_dim = left.take("num_attention_heads", int), left.take("attention_head_dim", int)
    embed_dim, length = left.take("embedding_dim", int), left.take("num_embeddings", int)
    left.must(**_PRIOR)
    for name, mine, there, theirs in (
        ("num_embeddings", length, "max_position_embeddings", text.context_length),
        ("embedding_dim", embed_dim, "projection_dim", text.embed_dim),
        ("embedding_dim", embed_dim, "hidden_size", text.width),
    ):
        if mine != theirs:
            raise InteropError(f"prior: {name} = {mine}: the text_encoder's {there} is {theirs}")
    found = {
        "embed_dim": embed_dim,
        "vocab_size": text.vocab_size,
        "context_length": length,
        "width": heads * head_dim,
        "depth": left.take("num_layers", int),
        "heads": heads,
        "clip_text": text,
    }
    left.done()
    return checked("prior", PriorConfig, found)


def prior_settings(config: PriorConfig) -> dict[str, Any]:
    """The `PriorTransformer` of a prior."""
    return {
        "_class_name": "PriorTransformer",
        **_PRIOR,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "embedding_dim": config.embed_dim,
        "num_embeddings": config.context_length,
    }


def unet_config(part: str, settings: Mapping[str, Any], *, image_size: int | None = None) -> UNetConfig:
    """Of an `UNet2DConditionModel` or `UNet2DModel`; the first has Karlo's attention, the second none.

    `image_size` is that of nets that do not say it.
    """
    conditioned = settings.get("_class_name") == "UNet2DConditionModel"
    left = Settings(part, settings, _DEFAULTS[conditioned] | {"sample_size": image_size})
    widths = left.take("block_out_channels", (list, tuple))
    side = left.take("sample_size", (int, type(None))) or image_size
    if side is None:
        raise InteropError(f"{part}: sample_size is missing")
    if not widths or any(not isinstance(width, int) or width < 1 for width in widths):
        raise InteropError(f"{part}: block_out_channels = {widths}: must be widths from 1 on")
    if any(width % widths[0] for width in widths):
        raise InteropError(f"{part}: block_out_channels = {widths}: each must be a multiple of the first")
    levels, channels = len(widths), widths[0]
    down, up = left.take("down_block_types", (list, tuple)), left.take("up_block_types", (list, tuple))
    attends = [name == _DOWN[1] for name in down]
    expected = [_DOWN[attending] for attending in attends], [_UP[attending] for attending in reversed(attends)]
    if (list(down), list(up)) != expected or len(down) != levels or any(attends) != conditioned:
        raise InteropError(
            f"{part}: down_block_types = {down}, up_block_types = {up}: not as in Karlo's {settings.get('_class_name')}"
        )
    shift = left.take("resnet_time_scale_shift", str)
    if shift not in ("default", "scale_shift"):
        raise InteropError(f"{part}: resnet_time_scale_shift = {shift!r}: must be default or scale_shift")
    head_channels = left.take("attention_head_dim", int)  # of UNet2DModel: of an attention that it does not have
    if conditioned:
        left.take("cross_attention_dim", int)  # read by who knows the context
        left.must(**_CONDITIONED)
    else:
        left.must(**_UNCONDITIONED)
    found = {
        "in_channels": left.take("in_channels", int),
        "out_channels": left.take("out_channels", int),
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "depth": left.take("layers_per_block", int),
        "attention_resolutions": tuple(side >> level for level, attending in enumerate(attends) if attending),
        "head_channels": head_channels,
        "dropout": float(left.take("dropout", (int, float))),
        "scale_shift_norm": shift == "scale_shift",
        "image_size": side,
    }
    left.done()
    config = checked(part, UNetConfig, found)
    check_groups(part, config)
    return config


def unet_settings(part: str, config: UNetConfig, *, context_dim: int | None) -> dict[str, Any]:
    """The `UNet2DConditionModel` (with a context) or `UNet2DModel` of a U-Net; `InteropError` where there is none."""
    if config.patch_size != 1:
        raise InteropError(f"{part}: unet.patch_size = {config.patch_size}: diffusers' networks have 1 alone")
    check_groups(part, config)
    attends = [config.attends(level) for level in range(len(config.widths))]
    if context_dim is None:
        kind = {**_UNCONDITIONED, "_class_name": "UNet2DModel"}
    else:
        kind = {
            **_CONDITIONED,
            "_class_name": "UNet2DConditionModel",
            "cross_attention_dim": context_dim,
        }
    return {
        **kind,
        "attention_head_dim": config.head_channels,
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.depth,
        "down_block_types": [_DOWN[attending] for attending in attends],
        "up_block_types": [_UP[attending] for attending in reversed(attends)],
        "dropout": config.dropout,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }


def check_groups(part: str, config: UNetConfig) -> None:
    """Refuses nets with layers so narrow that ours would have fewer than diffusers' 32 groups."""
    narrow = sorted(width for width in _normed(config) if group_norm(width).num_groups != _GROUPS)
    if narrow:
        raise InteropError(
            f"{part}: layers of {', '.join(map(str, narrow))} channels have fewer than {_GROUPS} groups here, and "
            f"norm_num_groups = {_GROUPS} in diffusers"
        )


def _normed(config: UNetConfig) -> Sequence[int]:
    """Widths of what group norms see."""
    widths, found = config.widths, set(config.widths)
    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * (config.depth + (level < len(widths) - 1))
    current = widths[-1]
    for width in reversed(widths):
        for _ in range(config.depth + 1):
            found.add(current + skips.pop())
            current = width
    return sorted(found)
