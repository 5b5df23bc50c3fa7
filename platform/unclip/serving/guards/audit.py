"""A line in the log for whatever the content policy refuses, without the prompt's text unless the operator wants it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, Literal

from unclip.serving.observe.logs import event

Where = Literal["prompt", "given picture", "picture"]
"""What was refused: a prompt, a picture that came with the request, one that was made."""


class Audit:
    """Writes the lines.

    A prompt is shown by an HMAC of it, so that the same one is known again and nobody finds it by hashing likely ones. The
    HMAC's key is made anew for each process and never leaves it.

    Args:
        prompts: whether the text of refused prompts is written as well.
    """

    def __init__(self, *, prompts: bool) -> None:
        self._prompts, self._key = prompts, secrets.token_bytes(32)

    def refused(self, *, hook: str, rule: str, where: Where, score: float | None, prompt: str | None) -> None:
        """One refusal: by which rule of which hook, how sure it was, and the prompt where that is what was refused."""
        told: dict[str, Any] = {"hook": hook, "rule": rule, "where": where}
        if score is not None:
            told["score"] = round(score, 4)
        if prompt is not None:
            told["prompt_hmac"] = hmac.new(self._key, prompt.encode(), hashlib.sha256).hexdigest()
            if self._prompts:
                told["text"] = prompt
        event("policy_refused", **told)
