"""Files that PyTorch saved, read as tensors and nothing else."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from unclip.interop.keys import InteropError, Shapes, Tensors

T = TypeVar("T")


def read_content(path: Path) -> Any:
    """What is in a file of tensors in lists and dictionaries, on the CPU; tensors are read from the disk as they are used.

    Raises `InteropError` where it holds anything else: what else a pickle may do is never done. So TorchScript archives, which
    are programs, are refused.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch says of TorchScript what the error says as well
            # Files from before PyTorch 1.6 are no archives, and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InteropError(f"{str(path)!r} is not read, as it is no file of tensors alone: {reason}") from None


def read_tensors(path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a state dictionary by name; see `read_content`.

    Args:
        key: what the state dictionary is saved under; None: the file is one.
    """
    content = read_content(path)
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not content:
        where = f" under {key!r}" if key is not None else ""
        raise InteropError(f"{str(path)!r} holds no state dictionary{where}")
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise InteropError(f"{str(path)!r}: {others[0]!r} is {type(content[others[0]]).__name__}, not a tensor")
    return content


def within(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Those (tensors or shapes) whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def shapes_in(tensors: Tensors) -> Shapes:
    """The shape of each."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
