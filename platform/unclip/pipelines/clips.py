"""CLIPs by the names that configurations have for them."""

from __future__ import annotations

from unclip.config.base import ConfigError
from unclip.models.clip import ClipModel, load_clip
from unclip.utils import storage
from unclip.utils.hub import HUB_PREFIX


def absolute_clip(source: str) -> str:
    """`source` as it means the same from any folder: absolute where it is a folder of ours, else a name as it is."""
    is_folder = not source.startswith(HUB_PREFIX) and storage.exists(storage.join(source, "config.json"))
    return storage.absolute(source) if is_folder else source


def load_clip_named(source: str) -> ClipModel:
    """The CLIP that `source` names; `ConfigError` says why there is none."""
    try:
        return load_clip(source)
    except (ValueError, RuntimeError) as error:  # the second is open_clip's, for what a hub does not have
        raise ConfigError(f"clip = {source!r}: {error}") from None
