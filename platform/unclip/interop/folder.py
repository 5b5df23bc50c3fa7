"""Folders of diffusers and transformers: a JSON configuration and a file of weights for each part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unclip.interop import torch_files
from unclip.interop.keys import InteropError

_NETWORK, _TRANSFORMERS = "diffusion_pytorch_model", "model"
_CONFIGS = {"scheduler": "scheduler_config.json", "feature_extractor": "preprocessor_config.json"}


def config_name(part: str) -> str:
    """The file that holds the configuration of a part."""
    return next((name for ending, name in _CONFIGS.items() if part.endswith(ending)), "config.json")


def read_config(folder: Path, part: str, *, inside: bool = True) -> dict[str, Any]:
    """The configuration of a part, `inside` its own folder or beside the others.

    Raises `InteropError` where it is missing or no JSON object.
    """
    return read_object((folder / part if inside else folder) / config_name(part))


def read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InteropError(f"{path} is missing") from None
    except ValueError as error:
        raise InteropError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InteropError(f"{path} must hold a JSON object, not {type(found).__name__}")
    return found


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a part, from safetensors, or from a `.bin` that holds nothing but tensors."""
    stems = [folder / name for name in (_NETWORK, _TRANSFORMERS, "pytorch_model")]
    for path in (Path(f"{stem}.safetensors") for stem in stems):
        if path.exists():
            try:
                return dict(load_file(path))
            except SafetensorError as error:
                raise InteropError(f"{path} cannot be read: {error}") from None
    for path in (Path(f"{stem}.bin") for stem in stems):
        if path.exists():
            return torch_files.read_tensors(path)
    raise InteropError(f"{folder}: has neither {_NETWORK}.safetensors nor {_TRANSFORMERS}.safetensors, nor a .bin")


def write_part(
    folder: Path, part: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """A part with its configuration and, where it has any, its weights."""
    where = folder / part
    where.mkdir(parents=True, exist_ok=True)
    write_object(where / config_name(part), config)
    if tensors is not None:
        name = _NETWORK if "_class_name" in config else _TRANSFORMERS
        save_file(dict(tensors), where / f"{name}.safetensors", metadata={"format": "pt"})


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
