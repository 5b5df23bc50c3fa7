"""CLIP through open_clip: pretrained by name, from a hub, from a file, or trained from scratch by our `clip` stage.

`load_clip(source)` understands, in this order:
- `hf-hub:ORG/NAME`, a model of the hub;
- a folder or address with `config.json` and `model.safetensors`, as the `clip` stage exports it;
- `ARCH/PRETRAINED`, an open_clip architecture with one of its pretrained tags or a checkpoint file: `ViT-B-32/openai`;
- `ARCH` alone: random weights, the same ones in every process, for trying things out.

open_clip is imported inside the functions that need it; importing this module costs nothing.
"""

from __future__ import annotations

import difflib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from unclip.config.base import Config
from unclip.models.layers import Depth
from unclip.utils import storage
from unclip.utils.hashing import fingerprint

_LOGGER = logging.getLogger(__name__)
_HUB_PREFIX = "hf-hub:"
_MODULE_PREFIX = "clip."  # of open_clip's parameters inside ClipModel
_VOCAB_SIZE = 49408
_MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, which open_clip keeps as its default
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipArchitectureConfig(Config):
    """Shape of a CLIP with transformers for picture and text, built as open_clip builds its own."""

    embed_dim: int = Field(ge=1)
    """width D of the joint space"""
    image_size: int = Field(ge=1)
    """side length in pixels of the pictures it sees"""
    vision_layers: Depth
    """blocks of the picture's transformer"""
    vision_width: int = Field(ge=1)
    """width of the picture's transformer"""
    vision_patch_size: int = Field(ge=1)
    """side length in pixels of a patch"""
    vision_head_width: int = Field(default=64, ge=1)
    """width of an attention head of the picture's transformer"""
    context_length: int = Field(default=77, ge=2)
    """tokens of a caption, with start, end and padding"""
    text_width: int = Field(ge=1)
    """width of the text transformer"""
    text_heads: int = Field(ge=1)
    """attention heads of the text transformer"""
    text_layers: Depth
    """blocks of the text transformer"""
    quick_gelu: bool = False
    """True: x * sigmoid(1.702 x) in place of GELU in both, as OpenAI's weights need it"""
    activation_checkpointing: bool = False
    """compute the blocks' activations again in the backward pass instead of keeping them"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, part, whole_name, whole in (
            ("vision_patch_size", self.vision_patch_size, "image_size", self.image_size),
            ("vision_head_width", self.vision_head_width, "vision_width", self.vision_width),
            ("text_heads", self.text_heads, "text_width", self.text_width),
        ):
            if whole % part:
                raise ValueError(f"{name} = {part}: does not divide {whole_name} = {whole}")
        return self

    def open_clip_config(self) -> dict[str, Any]:
        """The same in open_clip's words."""
        vision = {
            "image_size": self.image_size,
            "layers": self.vision_layers,
            "width": self.vision_width,
            "patch_size": self.vision_patch_size,
            "head_width": self.vision_head_width,
        }
        text = {
            "context_length": self.context_length,
            "vocab_size": _VOCAB_SIZE,
            "width": self.text_width,
            "heads": self.text_heads,
            "layers": self.text_layers,
        }
        quick_gelu = (
            {"quick_gelu": True} if self.quick_gelu else {}
        )  # as in open_clip's own, where it is left out if false
        return {"embed_dim": self.embed_dim, "vision_cfg": vision, "text_cfg": text, **quick_gelu}

    def build(self) -> ClipModel:
        """The model with random weights."""
        import open_clip

        # A temperature of shape (1,), since DeepSpeed cannot broadcast a parameter without dimensions.
        clip = open_clip.CLIP(**self.open_clip_config(), nonscalar_logit_scale=True)
        if self.activation_checkpointing:
            for block in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks):
                block.forward = partial(_recomputed, block.forward)
        return ClipModel(clip, ClipDescription(self.open_clip_config()), Tokenizer(None))


class ClipConfig(Config):
    """Which CLIP: one of open_clip's or the hub's by name, or an architecture of our own."""

    source: str | None = None
    """what `load_clip` understands; excludes `architecture`"""
    architecture: ClipArchitectureConfig | None = None
    """a CLIP with random weights; excludes `source`"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source is None) == (self.architecture is None):
            raise ValueError("exactly one of source and architecture must be given")
        return self

    def build(self, device: torch.device | str = "cpu") -> ClipModel:
        """The model: random weights of `architecture`, or what `source` names with its weights."""
        if self.architecture is not None:
            return self.architecture.build().to(device)
        assert self.source is not None
        return load_clip(self.source, device)


@dataclass(frozen=True)
class ClipDescription:
    """What besides its weights makes a CLIP: open_clip's model configuration, mean and deviation of its pixels."""

    model: dict[str, Any]
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    def to_json(self) -> str:
        return json.dumps({"model": self.model, "mean": list(self.mean), "std": list(self.std)}, sort_keys=True)


class Tokenizer:
    """Captions -> tokens, without any weights; cheap to pickle, since the vocabulary is read where it is used first.

    Args:
        name: an open_clip architecture or `hf-hub:` model, or None for CLIP's byte-pair encoding.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name

    def __call__(self, texts: Sequence[str], context_length: int) -> np.ndarray:
        """(B, context_length) int32, padded with 0; longer captions are cut, the end-of-text token stays."""
        if not texts:
            return np.zeros((0, context_length), dtype=np.int32)
        tokens: torch.Tensor = _open_clip_tokenizer(self.name)(list(texts), context_length=context_length)
        return tokens.numpy().astype(np.int32)

    @property
    def is_byte_pair_encoding(self) -> bool:
        """Whether its tokens are those of CLIP's byte-pair encoding, with 0 behind the caption's end."""
        import open_clip

        return isinstance(_open_clip_tokenizer(self.name), open_clip.SimpleTokenizer)


_MOST_WORDS, _LONGEST_WORD = 2**17, 64


@lru_cache(maxsize=4)
def _open_clip_tokenizer(name: str | None) -> Any:
    import open_clip

    tokenizer = open_clip.SimpleTokenizer() if name is None else open_clip.get_tokenizer(name)
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        tokenizer.cache = _Words(tokenizer.cache)
    return tokenizer


class _Words(dict[str, str]):
    """Words that a tokenizer remembers in pieces: no more than there is room for, whatever strangers write. None is dropped,
    since threads look whether a word is there and then take it."""

    def __setitem__(self, word: str, pieces: str) -> None:
        if len(self) < _MOST_WORDS and len(word) <= _LONGEST_WORD:
            super().__setitem__(word, pieces)


class ClipModel(nn.Module):
    """One interface to every CLIP. Embeddings are float32, of unit norm unless asked for otherwise.

    Its weights are open_clip's under `clip.`.
    """

    def __init__(self, clip: nn.Module, description: ClipDescription, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.clip = clip
        self.description = description
        self.tokenizer = tokenizer

    @property
    def image_size(self) -> int:
        """Side length in pixels of the pictures that the model sees."""
        size: Any = self.clip.get_submodule("visual").image_size
        return int(size[0] if isinstance(size, Sequence) else size)

    @property
    def embed_dim(self) -> int:
        return int(self.description.model["embed_dim"])

    @property
    def context_length(self) -> int:
        """Tokens of a caption."""
        return int(self._text_tower.context_length)

    @property
    def text_state_dim(self) -> int:
        """Width S of the states of a token; `ValueError` says why this CLIP has none, see `encode_text_states`."""
        return int(self._final_norm.normalized_shape[0])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of architecture, pixel statistics and weights at the first call: the identity of a frozen CLIP."""
        return fingerprint(self.clip.state_dict(), self.description.to_json())

    def preprocess(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Pictures as the network wants them: (B, H, W, 3) uint8 -> (B, 3, image_size, image_size) float32.

        The central square is taken, resized (bicubic, antialiased) where its size differs, and normalised.
        """
        # A copy of arrays, which may be read-only: those that come out of Arrow are.
        pictures = (images if isinstance(images, torch.Tensor) else torch.tensor(images)).to(self._device)
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise ValueError(f"images are {pictures.dtype} {tuple(pictures.shape)}: expected uint8 (B, H, W, 3)")
        side = min(pictures.shape[1:3])
        top, left = (pictures.shape[1] - side) // 2, (pictures.shape[2] - side) // 2
        pixels = pictures[:, top : top + side, left : left + side].permute(0, 3, 1, 2).float() / 255
        if side != self.image_size:
            pixels = functional.interpolate(
                pixels, (self.image_size, self.image_size), mode="bicubic", antialias=True
            ).clamp(0, 1)
        mean, std = (
            pixels.new_tensor(values).view(3, 1, 1) for values in (self.description.mean, self.description.std)
        )
        return (pixels - mean) / std

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Captions -> (B, context_length) int64, on the model's device."""
        return torch.from_numpy(self.tokenizer(texts, self.context_length)).to(self._device, torch.int64)

    @torch.no_grad()
    def encode_image(self, images: torch.Tensor | np.ndarray, *, unit_norm: bool = True) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, D); without `unit_norm` as the projection gives them, for Karlo's decoder."""
        pixels = self.preprocess(images).to(self._dtype)
        embeds: torch.Tensor = self.clip.encode_image(pixels).float()  # type: ignore[operator]
        return functional.normalize(embeds, dim=-1) if unit_norm else embeds

    @torch.no_grad()
    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, context_length) integers -> (B, D)."""
        self._check_tokens(tokens)
        return functional.normalize(self.clip.encode_text(tokens.to(self._device).long()).float(), dim=-1)  # type: ignore[operator]

    @torch.no_grad()
    def encode_text_states(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, context_length) integers -> embeddings (B, D), and the states (B, context_length, S) they are made of.

        The states are those of all tokens after the last block and the final norm, before pooling and projection, float32;
        those behind the caption's end are there, but mean nothing. GLIDE (section 4.1) gives its decoder the last
        layer's states of a text transformer of its own, which unCLIP (section 2.1) keeps; Karlo takes these in its place.

        Raises `ValueError` where a CLIP has no such states, or its tokens are of another kind than the decoder's.
        """
        states, thread = list[torch.Tensor](), threading.get_ident()

        def keep(_: nn.Module, __: object, output: torch.Tensor) -> None:
            if threading.get_ident() == thread:  # servers encode in two threads at once
                states.append(output)

        with self._final_norm.register_forward_hook(keep):
            embeds = self.encode_text(tokens)
        return embeds, states[0].float()

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For training: image embeddings (B, D), text embeddings (B, D) and the logits' scale, at most 100.

        Args:
            images: (B, H, W, 3) uint8.
            tokens: (B, context_length) integers.
        """
        self._check_tokens(tokens)
        # Through the module's own forward, which is where ZeRO-3 gathers its parameters.
        with _attention_kernels(self._device):
            output = self.clip(self.preprocess(images).to(self._dtype), tokens.long())
        image, text, scale = output.values() if isinstance(output, dict) else output[:3]
        scale = scale.float().clamp(max=_MAX_LOGIT_SCALE).reshape(())
        return functional.normalize(image.float(), dim=-1), functional.normalize(text.float(), dim=-1), scale

    @property
    def _text_tower(self) -> Any:
        return self.clip.text if hasattr(self.clip, "text") else self.clip

    @property
    def _final_norm(self) -> nn.LayerNorm:
        """Of the text transformer, over all tokens."""
        norm = getattr(self._text_tower, "ln_final", None)
        if not isinstance(norm, nn.LayerNorm) or getattr(self._text_tower, "cls_emb", None) is not None:
            raise ValueError("its text encoder has no final norm over all tokens, so no states for a decoder")
        if not self.tokenizer.is_byte_pair_encoding:
            raise ValueError(
                "its tokens are not CLIP's byte-pair encoding, by which a decoder tells padding from caption"
            )
        return norm

    @property
    def _device(self) -> torch.device:
        return next(self.clip.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.clip.parameters()).dtype

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        if tokens.shape[1:] != (self.context_length,):
            raise ValueError(f"tokens are {tuple(tokens.shape)}: this CLIP takes (B, {self.context_length})")


def _attention_kernels(device: torch.device) -> AbstractContextManager[None]:
    """PyTorch's fused attention takes 7 times as long in bfloat16 training on CPUs as its unfused one."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _recomputed(forward: Callable[..., torch.Tensor], x: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """A block's `forward` whose activations are computed again in the backward pass, by the same attention kernels.

    open_clip's own way (`set_grad_checkpointing`) takes the kernels that are chosen where the backward pass runs.
    """
    if not torch.is_grad_enabled():
        return forward(x, **inputs)
    kernels = partial(_attention_kernels, x.device)
    result: torch.Tensor = checkpoint(
        forward, x, use_reentrant=False, context_fn=lambda: (nullcontext(), kernels()), **inputs
    )
    return result


def load_clip(source: str, device: torch.device | str = "cpu") -> ClipModel:
    """The CLIP that `source` names (see the module's text), frozen, in evaluation mode.

    Raises:
        ValueError: where `source` is neither a folder of ours nor a name of open_clip; close names are suggested.
    """
    clip_folder = not source.startswith(_HUB_PREFIX) and storage.exists(storage.join(source, "config.json"))
    model = _load_folder(source) if clip_folder else _load_open_clip(source)
    return model.to(device).eval().requires_grad_(False)


def tokenizer_for(source: str | None) -> Tokenizer:
    """The tokenizer of the CLIP that `source` names, without its weights; None: CLIP's byte-pair encoding."""
    if source is None or source.startswith(_HUB_PREFIX):
        return Tokenizer(source)
    if storage.exists(storage.join(source, "config.json")):
        return tokenizer_for(_folder_config(source).source)
    return Tokenizer(_split_name(source)[0])


def _folder_config(folder: str) -> ClipConfig:
    settings = storage.read_json(storage.join(folder, "config.json"))
    return ClipConfig.from_dict({name: settings[name] for name in ClipConfig.model_fields if name in settings})


def _load_folder(folder: str) -> ClipModel:
    """A CLIP written by the `clip` stage; its weights carry open_clip's names, with or without `clip.` before them."""
    from safetensors.torch import load_file

    config = _folder_config(folder)
    model = config.build() if config.architecture is not None else _load_open_clip(config.source or "", weights=False)
    with storage.local_file(storage.join(folder, "model.safetensors")) as path:
        weights = load_file(path)
    model.clip.load_state_dict({name.removeprefix(_MODULE_PREFIX): value for name, value in weights.items()})
    return model


def _load_open_clip(source: str, *, weights: bool = True) -> ClipModel:
    import open_clip

    name, pretrained = (source, None) if source.startswith(_HUB_PREFIX) else _split_name(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if pretrained is not None and weights and storage.exists(pretrained):
            with storage.local_file(pretrained) as path:
                clip = open_clip.create_model(name, pretrained=str(path))
        else:
            clip = open_clip.create_model(name, pretrained=pretrained, load_weights=weights, pretrained_text=weights)
    if pretrained is None and weights and not source.startswith(_HUB_PREFIX):
        _LOGGER.warning("CLIP %r names no pretrained weights: its weights are random", source)
    pixels = clip.visual.preprocess_cfg
    description = ClipDescription(open_clip.get_model_config(name), tuple(pixels["mean"]), tuple(pixels["std"]))
    return ClipModel(clip, description, Tokenizer(name))


def _split_name(source: str) -> tuple[str, str | None]:
    """`ARCH` or `ARCH/PRETRAINED` taken apart and checked against what open_clip knows and what files exist."""
    import open_clip

    architecture, _, pretrained = source.partition("/")
    if architecture not in open_clip.list_models():
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"CLIP {source!r} is no folder with a config.json and no architecture of open_clip{hint}")
    if not pretrained:
        return architecture, None
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained not in tags and not storage.exists(pretrained):
        raise ValueError(
            f"CLIP {source!r}: {pretrained!r} is neither a checkpoint file nor a pretrained tag of {architecture}; "
            f"tags: {', '.join(tags) or 'none'}"
        )
    return architecture, pretrained
