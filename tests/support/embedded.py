"""Embedded records as jobs/embed.py leaves them, and a frozen CLIP to make them with: in this process, without Ray."""

from __future__ import annotations

import numpy as np
import torch

from unclip.data.batches import BatchSpec, make_batch
from unclip.data.embedded_folder import EmbeddedFolder, write_part
from unclip.data.embedding import ClipEmbedStage, EmbeddingStatistics
from unclip.data.manifest import read_slices, scan
from unclip.models.clip import ClipArchitectureConfig, load_clip
from unclip.pipelines.bundle import ClipReference, save_stage
from unclip.pipelines.stages import ClipStageConfig
from unclip.training.setup import clip_facts


def save_clip(bundle: str, architecture: ClipArchitectureConfig, *, seed: int = 0) -> str:
    """The folder of a `clip` stage with random weights."""
    torch.manual_seed(seed)
    model = architecture.build()
    reference = ClipReference(source=f"{bundle}/clip", fingerprint=model.fingerprint)
    stage = ClipStageConfig(architecture=architecture)
    save_stage(bundle, stage, tensors=model.state_dict(), clip=reference, provenance={})
    return reference.source


def embed(records: str, out: str, clip_source: str, *, text_states: bool = False) -> str:
    """Writes the records of a folder with their embeddings by the CLIP `clip_source` into `out`; returns `out`."""
    clip = load_clip(clip_source)
    spec = BatchSpec(
        clip_image_size=clip.image_size, clip_tokenizer=clip_source, clip_context_length=clip.context_length
    )
    stage = ClipEmbedStage(clip_source, text_states=text_states)
    stage.setup()
    folder = EmbeddedFolder(scan(records), out, {"clip": clip.fingerprint})
    folder.begin()
    statistics = EmbeddingStatistics(clip.embed_dim)
    for file, fragments in folder.shards.items():
        for unit in (unit for fragment in fragments for unit in folder.units(fragment)):
            table = read_slices(folder.source, [unit], spec.columns())
            write_part(folder.uri, unit, stage.process(make_batch(table, np.arange(*unit[1:]), spec, seed=0)))
        folder.write_shard(file)
        statistics.merge(folder.statistics([file]))
    folder.finish(clip_facts(clip, clip_source, text_states=text_states), statistics)
    folder.clean()
    return out
