"""Addresses in a server's configuration, which is written in one place and read on other machines."""

from __future__ import annotations

import os
import re

from unclip.config.base import ConfigError
from unclip.utils import storage

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def resolved(address: str) -> str:
    """`address` as all processes may use it: absolute, with `$NAME` and `${NAME}` replaced by what the environment has.

    A RayService's configuration is not read by a shell, and where a platform's storage lies is said once, in the
    environment of its pods. `ConfigError` for a variable that is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ConfigError(f"{address!r}: {name} is not set in the environment")
        return os.environ[name].rstrip("/")

    return storage.absolute(_VARIABLE.sub(value, address))
