"""Our side of the comparison of chains, and what both sides begin with: records, a CLIP, its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from benchmarks.common import parameter_count
from safetensors.torch import save_file

from unclip.cluster.embed import EmbedConfig, run_embed
from unclip.cluster.fit import fit
from unclip.cluster.generate import run_generate
from unclip.data.decode import decode_image
from unclip.data.manifest import read_slices, scan
from unclip.data.transforms import resize_square
from unclip.generation.bulk.config import GenerateConfig
from unclip.models.clip import ClipModel, load_clip
from unclip.models.text import caption_mask
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.stages import StageName
from unclip.recipes import RECIPES

STAGES: tuple[StageName, ...] = ("prior", "decoder")
IMAGE_SIZE = 64
"""Side of all pictures in pixels."""


def table_of(uri: str, columns: Sequence[str]) -> pa.Table:
    """All rows of a folder of records, in order."""
    manifest = scan(uri, columns)
    slices = [(index, 0, fragment.rows) for index, fragment in enumerate(manifest.fragments)]
    return read_slices(manifest, slices, columns)


def train(
    stage: StageName, recipe: str, seconds: float, *, data: Path, bundle: Path, run: Path, seed: int = 0
) -> dict[str, Any]:
    """Trains a stage of our recipe for a time; the run's summary."""
    config = RECIPES[stage][recipe]().merged(
        {
            "seed": seed,
            "run": str(run),
            "bundle": str(bundle),
            "clip": str(bundle / "clip") if stage != "clip" else None,
            "data": {"path": str(data)},
            "loop": {"max_steps": 1_000_000, "time_limit_s": seconds, "checkpoint_every_s": 60.0},
        }
    )
    return fit(config)


def train_chain(folder: Path, recipe: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Prior and decoder, each for its seconds; what each took and how large it is."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        run, bundle = folder / "unclip" / stage, folder / "bundle"
        summary = train(stage, recipe, seconds[stage], data=folder / "embedded", bundle=bundle, run=run)
        taken = {"seconds": summary["seconds"], "steps": summary["step"], "samples": summary["samples_seen"]}
        found[stage] = taken | parameters(bundle, stage)
    return found


def parameters(bundle: Path, stage: StageName) -> dict[str, int]:
    """`parameters` without the table of the vocabulary, which costs no work and which a peer's CLIP has, and all of them."""
    model = Bundle.load(str(bundle)).load_model(stage)
    vocabulary = sum(value.numel() for name, value in model.named_parameters() if "token_embedding" in name)
    return {"parameters": parameter_count(model) - vocabulary, "with_vocabulary": parameter_count(model)}


def embed(folder: Path, records: Path) -> None:
    """The training records with embeddings beside, and the same as tensors for the peer."""
    run_embed(
        EmbedConfig(
            data=str(records), out=str(folder / "embedded"), clip=str(folder / "bundle" / "clip"), text_states=True
        )
    )
    clip = load_clip(str(folder / "bundle" / "clip"))
    table = table_of(str(folder / "embedded"), ("image", "caption", "image_embed", "text_embed", "text_states"))
    tensors = {name: _vectors(table.column(name)) for name in ("image_embed", "text_embed", "text_states")}
    pictures = np.stack([resize_square(decode_image(image), IMAGE_SIZE) for image in table.column("image").to_pylist()])
    tensors["image"] = torch.from_numpy(pictures)
    tensors["text_states"] = masked(clip, table.column("caption").to_pylist(), tensors["text_states"])
    save_file(tensors, folder / "train.safetensors")


def masked(clip: ClipModel, captions: Sequence[str], states: torch.Tensor) -> torch.Tensor:
    """The states (N, L * S) or (N, L, S) of captions' tokens as (N, L, S), zero where there is no token: the peer's mark."""
    mask = caption_mask(clip.tokenize(captions)).cpu()
    return (states.reshape(len(states), clip.context_length, -1) * mask.unsqueeze(-1)).contiguous()


def write_test(folder: Path, splits: Sequence[Path], limit: int | None) -> None:
    """The records that both sides are judged by, their captions as a list of prompts, and as tensors for the peer."""
    table = pa.concat_tables([table_of(str(split), ("id", "image", "caption")) for split in splits])
    rows = np.arange(len(table)) if limit is None else np.linspace(0, len(table) - 1, min(limit, len(table)), dtype=int)
    table = table.take(rows)
    (folder / "test").mkdir(exist_ok=True)
    pq.write_table(table, folder / "test" / "part-00000.parquet", row_group_size=64)
    captions = table.column("caption").to_pylist()
    clip = load_clip(str(folder / "bundle" / "clip"))
    embeds, states = clip.encode_text_states(clip.tokenize(captions))
    tensors = {"text_embed": embeds.contiguous(), "text_states": masked(clip, captions, states)}
    save_file(tensors, folder / "captions.safetensors")


def sample(folder: Path, pictures: int) -> dict[str, Any]:
    """So many pictures of each caption by the generation job, as the bundle's recipe samples, each with a seed of its own."""
    captions = table_of(str(folder / "test"), ("caption",)).column("caption").to_pylist()
    rows = list(range(len(captions)))
    prompts = pa.table({"id": rows, "prompt": captions, "seed": [row * pictures for row in rows]})
    pq.write_table(prompts, folder / "prompts.parquet")
    config = GenerateConfig.from_dict(
        {
            "bundle": str(folder / "bundle"),
            "prompts": str(folder / "prompts.parquet"),
            "out": str(folder / "unclip" / "pictures"),
            "format": "parquet",
            "n": pictures,
        }
    )
    manifest = run_generate(config)
    assert manifest["counts"]["pictures"] == pictures * len(captions), manifest["counts"]
    stages = Bundle.load(str(folder / "bundle")).configs
    sampling = {stage: stages[stage].to_dict()["sampling"] for stage in STAGES}
    return {"seconds_per_picture": manifest["seconds"] / manifest["counts"]["pictures"], "sampling": sampling}


def _vectors(column: pa.ChunkedArray) -> torch.Tensor:
    array = column.combine_chunks()
    return torch.from_numpy(array.flatten().to_numpy().reshape(len(array), -1).copy())
