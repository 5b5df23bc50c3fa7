"""Weights of networks that judge: a safetensors file of this machine, of an object store, or of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from unclip.config.base import ConfigError
from unclip.utils import storage
from unclip.utils.hashing import sha256_file
from unclip.utils.hub import HUB_PREFIX, hub_file, parse_hub


def absolute_weights(source: str) -> str:
    """`source` as it means the same from any folder."""
    return source if source.startswith(HUB_PREFIX) else storage.absolute(source)


def check_weights(field: str, source: str, build: Callable[[], nn.Module], what: str) -> str:
    """The hash of the file that `field` names; `ConfigError` where there is none, or it is of another network.

    Args:
        build: the network that it is for.
        what: the same, for people.
    """
    with torch.device("meta"):
        network = build()
    with _local_weights(field, source) as path:
        _fill(network, path, field, source, what, assign=True)
        return sha256_file(path)


def load_weights(field: str, source: str, sha256: str, network: nn.Module, what: str) -> None:
    """Fills `network`; `ConfigError` where the file is not the one that was looked at first.

    Args:
        sha256: what `check_weights` gave.
    """
    with _local_weights(field, source) as path:
        if sha256_file(path) != sha256:
            raise ConfigError(f"{field} = {source!r}: is another file here than where this job began")
        _fill(network, path, field, source, what, assign=False)


def _fill(network: nn.Module, path: Path, field: str, source: str, what: str, *, assign: bool) -> None:
    try:
        network.load_state_dict(load_file(path), assign=assign)
    except (RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{field} = {source!r}: not the weights of {what} as safetensors: {error}") from None


@contextmanager
def _local_weights(field: str, source: str) -> Iterator[Path]:
    try:
        name = parse_hub(source)
        if name is not None and name.path is None:
            raise ValueError(f"{source!r}: names no file; expected {HUB_PREFIX}ORG/NAME/FILE")
    except ValueError as error:
        raise ConfigError(f"{field} = {error}") from None
    if name is not None:
        try:
            found = hub_file(name)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{field} = {source!r}: the hub does not give it: {reason}") from None
        yield found
        return
    if not storage.size(source):
        raise ConfigError(f"{field} = {source!r}: there is no such file")
    with storage.local_file(source) as path:
        yield path
