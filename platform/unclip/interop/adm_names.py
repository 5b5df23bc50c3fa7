"""The names and packings of OpenAI's U-Net (guided-diffusion's code for ADM) and transformer (GLIDE's), which Karlo kept.

The U-Net's blocks are lists: `input_blocks.0.0` is the stem, `input_blocks.I`, `middle_block` and `output_blocks.I` are the
layers. In a layer the residual block comes first, then attention where there is any, then the residual block that doubles the
resolution. Attention's projections are convolutions of size 1 over a sequence; our linear layers have their weights without
that last dimension. Heads are packed as ours are, query, key and value head by head, but with `new_attention_order` all heads'
queries come first, then all keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from unclip.interop.keys import Entry, InteropError, Shapes, layer
from unclip.models.unet import UNet, UNetConfig

Pack = Callable[[torch.Tensor], torch.Tensor]
"""Brings the rows of a weight or bias into another order."""

_GROUPS = 32
_RESIDUAL = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
}
_TRANSFORMER = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_qkv",
    "attention_out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "context_kv": "encoder_kv", "out": "proj_out"}
_MODULES = {
    "time_embed.layers.0": "time_embed.0",
    "time_embed.layers.2": "time_embed.2",
    "stem": "input_blocks.0.0",
    "head_norm": "out.0",
    "head": "out.2",
}


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def unet_config(shapes: Shapes, *, image_size: int, head_channels: int) -> UNetConfig:
    """The shape of the U-Net whose weights have `shapes`, by their original names without any prefix.

    Args:
        image_size: side of its pictures in pixels, which no weight tells.
        head_channels: width of an attention head, which no weight tells either.

    Raises `InteropError` where it is a U-Net that ours cannot be.
    """
    channels = _channels(shapes)
    ups = _count(shapes, "output_blocks")
    doubles = [index for index in range(ups) if _doubles(shapes, index)]
    levels = len(doubles) + 1
    if ups % levels or any((index + 1) % (ups // levels) for index in doubles):
        raise InteropError(
            f"output_blocks: {ups} of them, those that double the resolution are {doubles}: not {levels} levels"
        )
    depth = ups // levels - 1
    return _checked(
        {
            "in_channels": _shape(shapes, "input_blocks.0.0.weight")[1],
            "out_channels": _shape(shapes, "out.2.weight")[0],
            "image_size": image_size,
            "head_channels": head_channels,
            **_levels(shapes, channels=channels, levels=levels, depth=depth, image_size=image_size),
        },
        middle_attends="middle_block.1.qkv.weight" in shapes,
    )


def encoder_config(shapes: Shapes, *, image_size: int, head_channels: int, depth: int) -> UNetConfig:
    """The shape of the way down and the middle alone, as ADM's classifier has them; see `unet_config`.

    Args:
        depth: residual blocks of a level; without a way up, the weights do not tell where a level ends.
    """
    channels, downs = _channels(shapes), _count(shapes, "input_blocks") - 1
    levels, rest = divmod(downs + 1, depth + 1)
    if rest:
        raise InteropError(f"input_blocks: {downs} behind the stem are no levels of depth = {depth}")
    stem = _shape(shapes, "input_blocks.0.0.weight")[1]
    return _checked(
        {
            "in_channels": stem,
            "out_channels": stem,
            "image_size": image_size,
            "head_channels": head_channels,
            **_levels(shapes, channels=channels, levels=levels, depth=depth, image_size=image_size),
        },
        middle_attends="middle_block.1.qkv.weight" in shapes,
    )


def unet_entries(ours: Iterable[str], config: UNetConfig, *, new_attention_order: bool = False) -> list[Entry]:
    """The map of the parameters `ours`, of a `UNet` or of a classifier's stem, time embedding and `layers`.

    Args:
        new_attention_order: whether attention has the queries of all heads first (guided-diffusion's option of that name).
    """
    entries = list[Entry]()
    for module in dict.fromkeys(name.rpartition(".")[0] for name in ours):
        if module in _MODULES:
            entries += layer(module, _MODULES[module])
            continue
        path, index, part, name = module.split(".")
        place = _place(path, int(index), config)
        if part != "attention":
            position = place.first if part == "residual" else place.first + 1 + place.attends
            entries += layer(module, f"{place.block}.{position}.{_RESIDUAL[name]}")
            continue
        original = f"{place.block}.{place.first + 1}.{_ATTENTION[name]}"
        if name == "norm":
            entries += layer(module, original)
        elif name == "qkv" and new_attention_order:
            entries += projection(module, original, by_head(3, config.widths[place.level] // config.head_channels))
        else:
            entries += projection(module, original)
    return entries


def transformer_entries(depth: int) -> list[Entry]:
    """The blocks of a transformer of GLIDE's or Karlo's, and of ours; both pack their heads alike."""
    return [
        entry
        for index in range(depth)
        for name, original in _TRANSFORMER.items()
        for entry in layer(f"blocks.{index}.{name}", f"resblocks.{index}.{original}")
    ]


def transformer_depth(shapes: Shapes) -> int:
    """Number of blocks of the `transformer` whose weights are among `shapes`."""
    found = (re.match(r"transformer\.resblocks\.(\d+)\.", name) for name in shapes)
    return len({match[1] for match in found if match})


def by_head(parts: int, heads: int) -> tuple[Pack, Pack]:
    """From (parts * heads * D, ...), all heads' queries first, then all keys, …, to the same head by head; and back."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (parts, heads, -1)).transpose(0, 1).flatten(0, 2)

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2)

    return pack, unpack


def projection(ours: str, theirs: str, order: tuple[Pack, Pack] = (_as_is, _as_is)) -> list[Entry]:
    """A linear layer of ours that is a convolution of size 1 there; `order` brings its rows into ours and back."""
    pack, unpack = order
    return [
        Entry(
            f"{ours}.weight",
            (f"{theirs}.weight",),
            lambda found: pack(found[0].squeeze(-1)),
            lambda tensor: (unpack(tensor).unsqueeze(-1),),
        ),
        Entry(f"{ours}.bias", (f"{theirs}.bias",), lambda found: pack(found[0]), lambda tensor: (unpack(tensor),)),
    ]


def check_groups(model: nn.Module) -> None:
    """Raises `InteropError` where a normalisation of ours has other groups than the original's 32."""
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and module.num_groups != _GROUPS:
            raise InteropError(
                f"{name}: {module.num_channels} channels are normalised in {_GROUPS} groups there, here in "
                f"{module.num_groups}; only widths that are multiples of {_GROUPS}, from {4 * _GROUPS} on, mean the same"
            )


def _checked(found: Mapping[str, object], *, middle_attends: bool) -> UNetConfig:
    try:
        config = UNetConfig.from_dict(found)
    except ValueError as error:
        raise InteropError(f"its shape is none of ours: {error}") from None
    if middle_attends != bool(config.attention_resolutions):
        raise InteropError(
            f"middle_block: {'has' if middle_attends else 'has no'} attention, but attention_resolutions = "
            f"{config.attention_resolutions}; ours has attention in the middle where it has any, and only there"
        )
    with torch.device("meta"):
        check_groups(UNet(config))
    return config


def _levels(shapes: Shapes, *, channels: int, levels: int, depth: int, image_size: int) -> dict[str, object]:
    """What the way down says: width and attention of each level, and how the time embedding enters."""
    widths, attending = list[int](), list[int]()
    for level in range(levels):
        first = 1 + level * (depth + 1)
        widths.append(_shape(shapes, f"input_blocks.{first}.0.out_layers.3.weight")[0])
        if f"input_blocks.{first}.1.qkv.weight" in shapes:
            attending.append(image_size >> level)
    for width in widths:
        if width % channels:
            raise InteropError(
                f"a level is {width} wide, which is no multiple of the base width {channels}; ours has to be"
            )
    time = _shape(shapes, "input_blocks.1.0.emb_layers.1.weight")
    return {
        "channels": channels,
        "channel_mult": [width // channels for width in widths],
        "depth": depth,
        "attention_resolutions": attending,
        "scale_shift_norm": time[0] == 2 * widths[0],
    }


def _channels(shapes: Shapes) -> int:
    """The base width, of a U-Net whose ways of halving and of embedding time are ours."""
    found = [name for name in shapes if re.search(r"blocks\.\d+\.\d+\.(op|conv)\.", name)]
    if found:
        raise InteropError(
            f"{found[0]}: this U-Net halves and doubles by convolutions (resblock_updown = False), ours by residual blocks"
        )
    time, channels = _shape(shapes, "time_embed.0.weight")
    if time != 4 * channels:
        raise InteropError(f"time_embed.0.weight: time is embedded {time} wide, here 4 times the base width {channels}")
    return channels


class _Place(NamedTuple):
    """Where a layer of ours is: its modules are `block.first` and behind."""

    block: str
    first: int
    level: int
    attends: bool


def _place(path: str, index: int, config: UNetConfig) -> _Place:
    """The place of `down.INDEX`, `middle.INDEX`, `up.INDEX` or, in a classifier, `layers.INDEX`."""
    levels, each = len(config.channel_mult), config.depth + 1
    downs = levels * each - 1  # the last level is not halved
    if path == "layers":
        path, index = ("down", index) if index < downs else ("middle", index - downs)
    if path == "middle":
        attends = bool(config.attention_resolutions)
        return _Place("middle_block", index * (1 + attends), levels - 1, attends and index == 0)
    if path == "down":
        level, halves = divmod(index, each)
        return _Place(f"input_blocks.{index + 1}", 0, level, config.attends(level) and halves < config.depth)
    level = levels - 1 - index // each
    return _Place(f"output_blocks.{index}", 0, level, config.attends(level))


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise InteropError(f"{name} is missing: this is no U-Net of OpenAI's code")
    return shapes[name]


def _count(shapes: Shapes, blocks: str) -> int:
    """Number of blocks in a list."""
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")})


def _doubles(shapes: Shapes, index: int) -> bool:
    """Whether a block on the way up ends with a second residual block, which doubles the resolution."""
    return any(f"output_blocks.{index}.{place}.in_layers.0.weight" in shapes for place in (1, 2))
