"""Captions as they come to captions fit for a tokenizer: markup, control characters and odd white space removed."""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Self

from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.data.ingest.reasons import Refusal

_LONGEST_READ = 1 << 16  # characters; whatever is longer is refused before it is searched for markup

_TAG = re.compile(
    r"""<!--(?:(?!<!--).)*?-->|</?[a-z][a-z0-9]*+(?:\s++[\w:.-]++\s*+=\s*+(?:"[^"]*+"|'[^']*+'|[^\s<>"'=]++))*+\s*+/?>""",
    re.IGNORECASE | re.DOTALL,
)
_SPACES = re.compile(r"\s+")
_INVISIBLE = {
    *range(0x20), *range(0x7F, 0xA0),  # C0 and C1 controls
    0x00AD, 0x061C, 0x180E, 0x200B, 0x200E, 0x200F,  # soft hyphen, marks of direction, zero-width space
    *range(0x202A, 0x202F), *range(0x2060, 0x2070),  # overrides and isolates of direction, invisible operators
    0xFEFF, *range(0xFFF9, 0xFFFC), 0xFFFE, 0xFFFF,
}  # fmt: skip
_VISIBLE_ONLY = dict.fromkeys(_INVISIBLE - {ord(space) for space in "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85"})


class CaptionPolicy(Config):
    """Which captions are kept, after cleaning."""

    required: bool = True
    """Refuse rows without a caption; false keeps them with an empty one, for stages that read none."""
    min_length: int = Field(default=1, ge=1)
    """Characters that a caption, where there is one, has at least."""
    max_length: int = Field(default=2000, ge=1, le=_LONGEST_READ)
    """Characters that a caption has at most; longer ones are refused, not cut."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length = {self.min_length} is above max_length = {self.max_length}")
        return self


def clean_caption(encoded: bytes | None, policy: CaptionPolicy) -> str | Refusal:
    """The cleaned caption of UTF-8 bytes, or why there is none.

    In this order: HTML entities become characters (once), HTML tags and comments a space, invisible characters (controls,
    overrides of direction, zero-width spaces; not the joiners that emoji and Persian need) nothing, Unicode is put
    into form C, runs of white space become one space, and the ends are stripped. `<` that begins no tag stays.
    """
    if encoded is None:
        return _nothing("there is no caption", policy)
    try:
        text = encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        return Refusal("invalid_utf8", f"caption: byte {error.start} is not UTF-8: {error.reason}")
    if len(text) > _LONGEST_READ:
        return _too_long(len(text), policy)
    caption = _clean(text)
    if not caption:
        return _nothing("nothing is left of the caption" if text else "the caption is empty", policy)
    if len(caption) < policy.min_length:
        return Refusal("caption_too_short", f"{len(caption)} characters: less than {policy.min_length}")
    return _too_long(len(caption), policy) if len(caption) > policy.max_length else caption


def _clean(text: str) -> str:
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFC", text.translate(_VISIBLE_ONLY))
    return _SPACES.sub(" ", text).strip()


def _nothing(detail: str, policy: CaptionPolicy) -> str | Refusal:
    return Refusal("no_caption", detail) if policy.required else ""


def _too_long(length: int, policy: CaptionPolicy) -> Refusal:
    return Refusal("caption_too_long", f"{length} characters: more than {policy.max_length}")
