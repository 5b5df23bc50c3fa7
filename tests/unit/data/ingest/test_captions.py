"""Cleaning of captions, by example and by what holds for any text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclip.config.base import ConfigError
from unclip.data.ingest.captions import CaptionPolicy, clean_caption
from unclip.data.ingest.reasons import Refusal


def clean(text: str, **policy: object) -> str | Refusal:
    return clean_caption(text.encode(), CaptionPolicy.from_dict(policy))


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("a dog", "a dog"),
        ("  a\tdog\r\n\u00a0 and\u3000a cat ", "a dog and a cat"),
        ("salt &amp; pepper &#8211; &lt;3", "salt & pepper – <3"),
        ("&amp;amp;", "&amp;"),
        ("a <b>red</b> car<br/>at <a href='x' title=\"y > z\">night</a>", "a red car at night"),
        ("&lt;i&gt;soft&lt;/i&gt; light", "soft light"),
        ("x<!-- hidden > \n -->y", "x y"),
        ("1 < 2 and 3 > 2, a<b and c>d", "1 < 2 and 3 > 2, a<b and c>d"),
        ("cafe\u0301", "café"),
        ("null\0byte\x7f\x9b", "nullbyte"),
        ("\u202etxet desrever\u202c \u2066iso\u2069", "txet desrever iso"),
        ("zero\u200bwidth\ufeff soft\u00adhyphen", "zerowidth softhyphen"),
        ("family 👨‍👩‍👧 می‌خواهم", "family 👨‍👩‍👧 می‌خواهم"),
        ("مرحبا שלום 你好", "مرحبا שלום 你好"),
    ],
)
def test_what_becomes_of_a_caption(given: str, cleaned: str) -> None:
    assert clean(given) == cleaned


@given(st.text(max_size=60))
def test_a_clean_caption_holds_nothing_of_what_is_removed(text: str) -> None:
    cleaned = clean(text)
    if isinstance(cleaned, Refusal):
        assert cleaned.reason == "no_caption"
        return
    assert unicodedata.is_normalized("NFC", cleaned)
    assert cleaned == " ".join(cleaned.split())
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in cleaned)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "no_caption"),
        (b"", "no_caption"),
        (b" \t\n ", "no_caption"),
        ("<p>&nbsp;</p>\u200b".encode(), "no_caption"),
        (b"ab", "caption_too_short"),
        (b"a" * 11, "caption_too_long"),
        (b"a" * (1 << 20), "caption_too_long"),
        (b"caf\xe9 au lait", "invalid_utf8"),
        (b"\xed\xa0\x80 lone surrogate", "invalid_utf8"),
    ],
)
def test_captions_that_are_refused(caption: bytes | None, reason: str) -> None:
    found = clean_caption(caption, CaptionPolicy(min_length=3, max_length=10))
    assert isinstance(found, Refusal)
    assert found.reason == reason


def test_lengths_count_after_cleaning() -> None:
    assert clean("<b>abc</b>     d", min_length=5, max_length=5) == "abc d"


def test_captions_need_not_be_there() -> None:
    assert clean_caption(None, CaptionPolicy(required=False)) == ""
    assert clean(" ", required=False) == ""
    assert isinstance(clean("ab", required=False, min_length=3), Refusal)


def test_lengths_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_length = 9 is above max_length = 3"):
        CaptionPolicy.from_dict({"min_length": 9, "max_length": 3})


@pytest.mark.parametrize(
    "piece", ['<a b="', "<a ", "<a" + " " * 99, "<a b=c", "<!--", "<!-- >", "&", "&#", "</", "<a b='\""]
)
@pytest.mark.timeout(60)
def test_hostile_markup_is_searched_in_linear_time(piece: str) -> None:
    """Quadratic work over 60,000 characters would take minutes for all of these, and run into the time limit."""
    text = piece * (60_000 // len(piece))
    for _ in range(20):
        assert isinstance(clean(text, max_length=100), Refusal)
