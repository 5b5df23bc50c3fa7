"""Runs without Ray: one that is killed and called again ends with the bits of one that was not; embeddings are CLIP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.support.loop_runs import CPU, Records, let_saves_end

from unclip.data.batches import BatchSpec, make_batch
from unclip.data.embedding import clip_inputs
from unclip.data.manifest import DataError, scan
from unclip.models.clip import load_clip
from unclip.pipelines.bundle import Bundle
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.in_process import embed_here, train_here
from unclip.training.run_folder import RunFolder


def prior(root: Path, records: Records, **changes: Any) -> TrainConfig:
    places = {"run": str(root / "run"), "bundle": str(root / "bundle"), "data": {"path": records["embedded"]}}
    config = RECIPES["prior"]["debug"]().merged({**places, "clip": records["clip"], "loop": {"max_steps": 4}})
    return config.merged(changes)


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path, records: Records) -> None:
    seen: list[int] = []
    straight = train_here(prior(tmp_path / "straight", records), CPU, on_step=seen.append)
    assert (straight["step"], seen) == (4, [0, 1, 2, 3])

    config = prior(tmp_path / "killed", records)

    def kill(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_here(config, CPU, on_step=kill)
    let_saves_end()
    assert RunFolder(config.run).summary() is None
    seen.clear()
    train_here(config, CPU, on_step=seen.append)
    assert 0 not in seen
    assert seen[-1] == 3
    models = [Bundle.load(str(tmp_path / name / "bundle")).load_model("prior") for name in ("straight", "killed")]
    left, right = (model.state_dict() for model in models)
    assert all(torch.equal(left[name], right[name]) for name in left)

    seen.clear()
    assert train_here(config, CPU, on_step=seen.append)["step"] == 4  # finished: nothing is trained again
    assert not seen


def test_embeddings_are_those_of_the_clip(tmp_path: Path, openmoji: str, records: Records) -> None:
    source, out = f"{openmoji}/64/train", str(tmp_path / "out")
    embed_here(source, out, records["clip"])
    clip = load_clip(records["clip"])
    table = pq.read_table(next(Path(out).glob("*.parquet")))
    spec = BatchSpec(**clip_inputs(clip, records["clip"]))
    batch = make_batch(table.slice(0, 8).select(spec.columns()), np.arange(8), spec, seed=0)
    expected = clip.encode_image(torch.tensor(batch["clip_image"])).to(torch.float16).numpy()
    assert np.array_equal(np.stack(table.column("image_embed").to_pylist()[:8]).astype(np.float16), expected)
    assert scan(out).rows == scan(source).rows
    written = next(Path(out).glob("*.parquet")).stat().st_mtime_ns
    assert embed_here(source, out, records["clip"]) == out
    assert next(Path(out).glob("*.parquet")).stat().st_mtime_ns == written
    with pytest.raises(DataError, match="was begun with records"):
        embed_here(f"{openmoji}/64/heldout", out, records["clip"])
