"""Content hashes: of files, and of a set of named weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from unclip.utils import storage


def sha256_file(uri: str | Path) -> str:
    """The SHA-256 of a file's content as 64 hexadecimal digits; reads a megabyte at a time."""
    digest = hashlib.sha256()
    with storage.local_file(str(uri)) as path, path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(tensors: Mapping[str, torch.Tensor], description: str = "") -> str:
    """One SHA-256 for `description` and named tensors: 64 hexadecimal digits.

    Takes in each tensor's name, dtype, shape and bytes in the order of the names, so neither the order of insertion nor
    the device or memory layout counts, and a change of any single value does.
    """
    digest = hashlib.sha256()
    _add(digest, description.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        _add(digest, f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        _add(digest, tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, content: bytes | memoryview) -> None:
    """Adds `content` behind its length, so that no two sequences of parts read as the same bytes."""
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)
