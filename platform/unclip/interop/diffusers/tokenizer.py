"""CLIP's byte-pair encoding as transformers' `CLIPTokenizer` keeps it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from unclip.interop.folder import read_object, write_object
from unclip.interop.keys import InteropError

_START, _END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, context_length: int) -> None:
    """`vocab.json`, `merges.txt` and what `CLIPTokenizer` is told of them."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = _byte_pairs()
    write_object(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    write_object(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    write_object(folder / "tokenizer_config.json", settings | special)


def check_tokenizer(folder: Path, context_length: int) -> dict[str, str]:
    """Raises `InteropError` unless captions become the same tokens as here; what little differs, with the reason."""
    settings, special = read_object(folder / "tokenizer_config.json"), folder / "special_tokens_map.json"
    if special.exists():
        settings |= read_object(special)
    if settings.get("model_max_length") != context_length:
        raise InteropError(
            f"tokenizer: model_max_length = {settings.get('model_max_length')}: the text_encoder takes {context_length}"
        )
    merged = folder / "tokenizer.json"
    if merged.exists():
        found: Any = read_object(merged).get("model", {}).get("vocab")
    else:
        found = read_object(folder / "vocab.json")
    if found != _byte_pairs()[0]:
        raise InteropError("tokenizer: its vocabulary is not that of CLIP's byte-pair encoding")
    for name, ours in (("bos_token", _START), ("eos_token", _END)):
        if _text(settings.get(name)) not in (None, ours):
            raise InteropError(f"tokenizer: {name} = {settings[name]!r}: CLIP's, and ours, is {ours!r}")
    text = _text(settings.get("pad_token"))
    if text in (None, _END):
        return {}
    return {"tokenizer.pad_token": f"{text!r} there: captions with it in them become other tokens there than here"}


def _text(token: Any) -> Any:
    """A token's text, which may be described with more."""
    return token.get("content") if isinstance(token, dict) else token


@lru_cache(maxsize=1)
def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary under transformers' names, and the merges in their order."""
    import open_clip

    ours = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": _START, "<end_of_text>": _END}
    return {names.get(name, name): token for name, token in ours.encoder.items()}, sorted(
        ours.bpe_ranks, key=ours.bpe_ranks.__getitem__
    )
