"""What an importer is: it reads one kind of source and yields the stages of a bundle, each with an account of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from unclip.interop.keys import Account, InteropError, Shapes
from unclip.pipelines.bundle import ClipReference
from unclip.pipelines.stages import StageConfig


@dataclass(frozen=True)
class ImportedStage:
    """A stage of a bundle, made of a source.

    Attributes:
        config: the stage as the bundle will describe it.
        tensors: exactly the state dictionary of `config.build()`, float32.
        clip: the CLIP whose embeddings it sees; None unless `config.in_clip_space`.
        accounts: what became of the tensors and settings of each part of the source.
    """

    config: StageConfig
    tensors: Mapping[str, torch.Tensor]
    clip: ClipReference | None
    accounts: tuple[Account, ...]


@dataclass(frozen=True)
class Source:
    """What is imported.

    Attributes:
        path: a local file or folder.
        clip: what `load_clip` takes, for sources that do not bring their CLIP; None: none was named.
        flags: what the weights of some kinds do not tell, `--name value …` as their own scripts take it.
    """

    path: str
    clip: str | None = None
    flags: str = ""


Importer = Callable[[Source], Iterator[ImportedStage]]
"""Yields the stages one by one, CLIP first where the source has one, so that one stage at a time is in memory.

Raises `InteropError` where something cannot be taken over exactly; `FileNotFoundError` names a file that is missing.
"""


def shapes_of(config: StageConfig) -> Shapes:
    """Names and shapes of the state dictionary of a stage's network, which is not allocated."""
    with torch.device("meta"):
        network: nn.Module = config.build()
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


__all__ = ["ImportedStage", "Importer", "InteropError", "Source", "shapes_of"]
