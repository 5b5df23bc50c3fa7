"""Embedded records as jobs/embed.py leaves them, and a frozen CLIP to make them with: in this process, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from unclip.data.batches import BatchSpec, make_batch
from unclip.data.embedding import ClipEmbedStage, EmbeddingStatistics
from unclip.data.manifest import read_slices, scan
from unclip.models.clip import ClipArchitectureConfig, load_clip
from unclip.pipelines.bundle import ClipReference, save_stage
from unclip.pipelines.stages import ClipStageConfig


def save_clip(bundle: str, architecture: ClipArchitectureConfig, *, seed: int = 0) -> str:
    """The folder of a `clip` stage with random weights."""
    torch.manual_seed(seed)
    model = architecture.build()
    reference = ClipReference(source=f"{bundle}/clip", fingerprint=model.fingerprint)
    stage = ClipStageConfig(architecture=architecture)
    save_stage(bundle, stage, tensors=model.state_dict(), clip=reference, provenance={})
    return reference.source


def embed(records: str, out: str, clip_source: str) -> str:
    """Writes the records of a folder with their embeddings by the CLIP `clip_source` into `out`; returns `out`."""
    manifest, clip = scan(records), load_clip(clip_source)
    spec = BatchSpec(
        clip_image_size=clip.image_size, clip_tokenizer=clip_source, clip_context_length=clip.context_length
    )
    slices = [(index, 0, fragment.rows) for index, fragment in enumerate(manifest.fragments)]
    table = read_slices(manifest, slices, manifest.columns)
    stage = ClipEmbedStage(clip_source)
    stage.setup()
    batch = stage.process(make_batch(table, np.arange(table.num_rows), spec, seed=0))
    for name in ("image_embed", "text_embed"):
        column = pa.FixedSizeListArray.from_arrays(pa.array(batch[name].reshape(-1)), clip.embed_dim)
        table = table.append_column(name, column)
    Path(out).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, f"{out}/part-00000.parquet", row_group_size=8)
    statistics = EmbeddingStatistics()
    statistics.update(batch["image_embed"])
    facts: dict[str, Any] = {
        "clip": {"source": clip_source, "fingerprint": clip.fingerprint, "embed_dim": clip.embed_dim},
        "statistics": {
            "mean": statistics.mean.tolist(),
            "std": statistics.std.tolist(),
            "count": statistics.count,
        },
    }
    Path(out, "manifest.json").write_text(json.dumps(facts))
    return out
