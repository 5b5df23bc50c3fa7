"""Paths of requests as the app's routes know them, wherever it is mounted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def path_of(scope: Mapping[str, Any]) -> str:
    """Without the prefix under which a server has mounted the app: ASGI has it in `path` as well, and routes do not."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path
