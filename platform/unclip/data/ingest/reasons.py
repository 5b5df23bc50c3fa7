"""Why a row is not kept."""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """Why a row is not kept: a short code to count by, and a sentence for people.

    Sources have codes of their own (`fetch_failed`, `truncated_shard`, …); judging adds
    `no_image`, `not_a_picture`, `broken_picture`, `too_large`, `unsupported_pixels`, `too_small`, `too_elongated`,
    `no_caption`, `caption_too_short`, `caption_too_long`, `invalid_utf8`, `bad_embedding` and `filtered`.
    """

    reason: str
    detail: str
