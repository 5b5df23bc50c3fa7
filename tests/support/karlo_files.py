"""A folder of Karlo's own files with small random networks, and what they are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tests.support.openai_layout import KarloDecoder, KarloPrior, UNet, randomize
from torch import nn

from unclip.models.clip import ClipArchitectureConfig, ClipModel
from unclip.pipelines.bundle import ClipReference, save_stage
from unclip.pipelines.stages import ClipStageConfig

DIM, LENGTH = 32, 12
ARCHITECTURE = ClipArchitectureConfig(
    embed_dim=DIM,
    image_size=16,
    vision_layers=1,
    vision_width=64,
    vision_patch_size=8,
    context_length=LENGTH,
    text_width=DIM,
    text_heads=4,
    text_layers=2,
)
SHAPE = {"mult": (1, 2), "depth": 1, "attention": (1,)}
UPSAMPLER = {"in_channels": 6, "out_channels": 3, "mult": (1, 2), "attention": (), "scale_shift": False}


@dataclass(frozen=True)
class KarloFiles:
    """A folder of Karlo's with random weights, and the networks that they are of."""

    folder: Path
    clip_source: str
    clip: ClipModel
    prior: nn.Module
    decoder: nn.Module
    first: nn.Module
    last: nn.Module


def make_karlo_files(folder: Path) -> KarloFiles:
    clip = ARCHITECTURE.build()
    randomize(clip)
    reference = ClipReference(source="clip", fingerprint=clip.fingerprint)
    bundle = str(folder / "bundle")
    save_stage(
        bundle, ClipStageConfig(architecture=ARCHITECTURE), tensors=clip.state_dict(), clip=reference, provenance={}
    )
    prior = randomize(KarloPrior(length=LENGTH, width=128, depth=2, dim=DIM))
    decoder = randomize(KarloDecoder(dim=DIM, width=48, **SHAPE))
    first, last = (randomize(UNet(**UPSAMPLER), seed) for seed in (1, 2))
    save_karlo(folder / "prior-ckpt-step=1.ckpt", {"model.": prior})
    save_karlo(folder / "decoder-ckpt-step=1.ckpt", {"model.": decoder})
    save_karlo(folder / "improved-sr-ckpt-step=1.ckpt", {"model_first_steps.": first, "model_last_step.": last})
    torch.save((torch.linspace(-1, 1, DIM), torch.linspace(0.5, 2, DIM)), folder / "ViT-L-14_stats.th")
    return KarloFiles(folder, f"{bundle}/clip", clip.eval(), prior, decoder, first, last)


def save_karlo(path: Path, networks: dict[str, nn.Module]) -> None:
    state = {
        prefix + name: value for prefix, network in networks.items() for name, value in network.state_dict().items()
    }
    torch.save({"state_dict": state}, path)


@dataclass(frozen=True)
class Told:
    """A caption and the empty one, as Karlo's networks are told them; ours get the first twice, and drop the second."""

    tokens: torch.Tensor
    mask: torch.Tensor
    text_embed: torch.Tensor
    states: torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def of(cls, clip: ClipModel) -> Told:
        tokens = clip.tokenize(["a red circle", ""])
        _, states = clip.encode_text_states(tokens)
        raw = clip.clip.encode_text(tokens)  # type: ignore[operator]
        mask = torch.arange(LENGTH) <= tokens.argmax(dim=1, keepdim=True)
        return cls(tokens[:1].expand(2, -1), mask, raw, states, torch.tensor([False, True]))
