"""CLIPs of Hugging Face's transformers: their names of both towers, and what their configurations say.

Theirs keep query, key and value apart and write projections as linear layers; open_clip, whose names ours are, packs the
three one after the other and multiplies from the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unclip.interop.keys import Entry, InteropError, layer, prefixed, same
from unclip.interop.settings import Settings, checked
from unclip.models.clip import ClipArchitectureConfig
from unclip.models.clip_text import ClipTextConfig

ACTIVATIONS = {False: "gelu", True: "quick_gelu"}
_VOCAB_SIZE = 49408
_MLP_RATIO = 4
_TRAINING_ONLY = {  # of transformers: how a model was begun, trained, stored, or used for other things
    "architectures", "attention_dropout", "dropout", "dtype", "initializer_factor", "initializer_range", "model_type",
    "torch_dtype", "transformers_version", "projection_dim", "bos_token_id", "pad_token_id", "add_cross_attention",
    "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
    "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript",
    "typical_p", "use_bfloat16",
}  # fmt: skip


def text_entries(config: ClipTextConfig) -> list[Entry]:
    """open_clip's text transformer and `CLIPTextModelWithProjection`."""
    return [
        *same("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        *same("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        *_blocks("transformer", "text_model.encoder", config.depth),
        *layer("ln_final", "text_model.final_layer_norm"),
        *_projection("text_projection", "text_projection.weight"),
    ]


def vision_entries(config: ClipArchitectureConfig) -> list[Entry]:
    """open_clip's vision transformer and `CLIPVisionModelWithProjection`."""
    return [
        *same("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        *same("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        *same("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        *layer("visual.ln_pre", "vision_model.pre_layrnorm"),
        *_blocks("visual.transformer", "vision_model.encoder", config.vision_layers),
        *layer("visual.ln_post", "vision_model.post_layernorm"),
        *_projection("visual.proj", "visual_projection.weight"),
    ]


def embed_dim(settings: Mapping[str, Any]) -> int:
    """Width of the joint space, of a whole model's configuration or a tower's."""
    found: int = Settings("CLIP", settings, {"projection_dim": 512}).take("projection_dim", int)
    return found


def text_config(settings: Mapping[str, Any], embed_dim: int, *, part: str = "text_encoder") -> ClipTextConfig:
    """The shape of a text tower; `InteropError` where it is none of CLIP's."""
    left = _tower(part, settings)
    vocabulary = left.take("vocab_size", int)
    end = left.take("eos_token_id", (int, type(None)))
    if end not in (2, None, vocabulary - 1):  # 2 is what transformers writes for "the highest token"
        raise InteropError(f"{part}: eos_token_id = {end}: the end of text must be the last token, {vocabulary - 1}")
    found = {
        "vocab_size": vocabulary,
        "context_length": left.take("max_position_embeddings", int),
        "width": left.take("hidden_size", int),
        "depth": left.take("num_hidden_layers", int),
        "heads": left.take("num_attention_heads", int),
        "embed_dim": embed_dim,
        "quick_gelu": _quick_gelu(left),
    }
    _check_mlp(left, found["width"])
    left.done()
    return checked(part, ClipTextConfig, found)


def architecture(
    text: ClipTextConfig, vision: Mapping[str, Any], *, part: str = "image_encoder"
) -> ClipArchitectureConfig:
    """The shape of both towers; `InteropError` where open_clip does not build such ones."""
    left = _tower(part, vision)
    left.must(num_channels=3)
    width, heads = left.take("hidden_size", int), left.take("num_attention_heads", int)
    if heads < 1 or width % heads:
        raise InteropError(f"{part}: num_attention_heads = {heads}: does not divide hidden_size = {width}")
    _check_mlp(left, width)
    if _quick_gelu(left) != text.quick_gelu:
        raise InteropError(f"{part}: hidden_act = {vision.get('hidden_act')!r}: the text tower has another one")
    if text.vocab_size != _VOCAB_SIZE:
        raise InteropError(
            f"vocab_size = {text.vocab_size}: a CLIP of ours has the {_VOCAB_SIZE} of its byte-pair encoding"
        )
    found = {
        "embed_dim": text.embed_dim,
        "image_size": left.take("image_size", int),
        "vision_layers": left.take("num_hidden_layers", int),
        "vision_width": width,
        "vision_patch_size": left.take("patch_size", int),
        "vision_head_width": width // heads,
        "context_length": text.context_length,
        "text_width": text.width,
        "text_heads": text.heads,
        "text_layers": text.depth,
        "quick_gelu": text.quick_gelu,
    }
    left.done()
    return checked(part, ClipArchitectureConfig, found)


def text_of(config: ClipArchitectureConfig) -> ClipTextConfig:
    """The text tower of a CLIP."""
    return ClipTextConfig(
        vocab_size=_VOCAB_SIZE,
        context_length=config.context_length,
        width=config.text_width,
        depth=config.text_layers,
        heads=config.text_heads,
        embed_dim=config.embed_dim,
        quick_gelu=config.quick_gelu,
    )


def text_settings(config: ClipTextConfig) -> dict[str, Any]:
    """What `CLIPTextModelWithProjection` is told of it."""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": config.vocab_size - 1,
        **_tower_settings(config.width, config.depth, config.heads, config.embed_dim, config.quick_gelu),
    }


def vision_settings(config: ClipArchitectureConfig) -> dict[str, Any]:
    """What `CLIPVisionModelWithProjection` is told of it."""
    heads = config.vision_width // config.vision_head_width
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.vision_patch_size,
        "num_channels": 3,
        **_tower_settings(config.vision_width, config.vision_layers, heads, config.embed_dim, config.quick_gelu),
    }


def _tower(part: str, settings: Mapping[str, Any]) -> Settings:
    left = Settings(part, {name: value for name, value in settings.items() if name not in _TRAINING_ONLY})
    left.must(layer_norm_eps=1e-5)
    return left


def _tower_settings(width: int, depth: int, heads: int, embed_dim: int, quick_gelu: bool) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": _MLP_RATIO * width,
        "projection_dim": embed_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "hidden_act": ACTIVATIONS[quick_gelu],
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "dtype": "float32",
    }


def _check_mlp(left: Settings, width: int) -> None:
    left.must(intermediate_size=_MLP_RATIO * width)


def _quick_gelu(left: Settings) -> bool:
    name = left.take("hidden_act", str)
    if name not in ACTIVATIONS.values():
        raise InteropError(f"{left.part}: hidden_act = {name!r}: must be one of {', '.join(ACTIVATIONS.values())}")
    return bool(name == ACTIVATIONS[True])


def _blocks(ours: str, theirs: str, depth: int) -> list[Entry]:
    found: list[Entry] = []
    for index in range(depth):
        found += prefixed(_BLOCK, ours=f"{ours}.resblocks.{index}.", theirs=f"{theirs}.layers.{index}.")
    return found


def _stacked(ours: str, theirs: Sequence[str]) -> list[Entry]:
    """Theirs one after the other in one of ours."""
    return [Entry(ours, tuple(theirs), lambda parts: torch.cat(list(parts)), lambda tensor: tensor.chunk(len(theirs)))]


def _projection(ours: str, theirs: str) -> list[Entry]:
    return [Entry(ours, (theirs,), lambda parts: parts[0].T, lambda tensor: (tensor.T,))]


_BLOCK = [
    *layer("ln_1", "layer_norm1"),
    *_stacked("attn.in_proj_weight", [f"self_attn.{part}_proj.weight" for part in "qkv"]),
    *_stacked("attn.in_proj_bias", [f"self_attn.{part}_proj.bias" for part in "qkv"]),
    *layer("attn.out_proj", "self_attn.out_proj"),
    *layer("ln_2", "layer_norm2"),
    *layer("mlp.c_fc", "mlp.fc1"),
    *layer("mlp.c_proj", "mlp.fc2"),
]
