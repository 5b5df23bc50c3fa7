"""What the log says of refusals."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from unclip.serving.guards.audit import Audit


def line(
    caplog: pytest.LogCaptureFixture, audit: Audit, prompt: str | None, score: float | None = None
) -> dict[str, Any]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "unclip.serving"):
        audit.refused(hook="blocklist", rule="line 3", where="prompt", score=score, prompt=prompt)
    (record,) = caplog.records
    assert record.getMessage() == "policy_refused"
    fields: dict[str, Any] = record.unclip_fields  # type: ignore[attr-defined]
    return fields


def test_prompts_are_shown_by_a_keyed_hash(caplog: pytest.LogCaptureFixture) -> None:
    audit = Audit(prompts=False)
    first, again, other = (line(caplog, audit, prompt) for prompt in ("a bad thing", "a bad thing", "another"))
    assert first == again
    assert first.keys() == {"hook", "rule", "where", "prompt_hmac"}
    assert first["prompt_hmac"] != other["prompt_hmac"]
    assert "bad" not in str(first)
    assert line(caplog, Audit(prompts=False), "a bad thing")["prompt_hmac"] != first["prompt_hmac"]


def test_operators_may_want_the_text(caplog: pytest.LogCaptureFixture) -> None:
    assert line(caplog, Audit(prompts=True), "a bad thing")["text"] == "a bad thing"


def test_scores_and_pictures(caplog: pytest.LogCaptureFixture) -> None:
    assert line(caplog, Audit(prompts=True), None, score=0.123456) == {
        "hook": "blocklist",
        "rule": "line 3",
        "where": "prompt",
        "score": 0.1235,
    }
