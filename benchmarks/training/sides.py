"""One side of `benchmarks.training.step`: prints images a second, all workers together, as the last line."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from unclip.cluster.fit import fit
from unclip.data.openmoji import PrepareConfig, prepare
from unclip.diffusion.losses import diffusion_loss
from unclip.pipelines.pictures import to_signed
from unclip.pipelines.stages.decoder import decoder_condition
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.run_folder import RunFolder

BATCH = 4
"""Pictures of a worker's step."""
WARM_UP = 10
"""Steps at the start that are not counted: caches, allocators, the stream's first blocks."""
LOG_EVERY = 5
_UNET = {
    "channels": 64,
    "channel_mult": [1, 2, 2],
    "depth": 1,
    "attention_resolutions": [16],
    "head_channels": 32,
    "patch_size": 1,
}
"""5 million parameters that see 64 px: a second or so of work for a core and a step."""


def prepare_records(folder: Path) -> None:
    """OpenMoji at 64 px, once."""
    if not folder.exists():
        prepare(PrepareConfig(out=str(folder), sizes=(64,)))


def config(folder: Path, run: str, *, workers: int, precision: str, steps: int) -> TrainConfig:
    """ADM's inputs (class and picture), so that no CLIP is needed."""
    return RECIPES["decoder"]["adm_debug"]().merged(
        {
            "run": run,
            "bundle": None,
            "data": {"path": str(folder / "64" / "train"), "shuffle_rows": 4096},
            "objective": {"stage": {"model": {"unet": _UNET}}},
            "zero": {"stage": 1, "precision": precision},
            "optimizer": {"grad_clip": 1.0},
            "loop": {
                "max_steps": steps,
                "global_batch_size": BATCH * workers,
                "microbatch_size": BATCH,
                "log_every": LOG_EVERY,
                "checkpoint_every_s": 600.0,
            },
            "resources": {"num_workers": workers, "threads_per_worker": 1},
        }
    )


def platform(folder: Path, *, workers: int, precision: str, steps: int) -> float:
    """A whole run; the median of its log windows after the warm-up."""
    with tempfile.TemporaryDirectory() as run:
        fit(config(folder, run, workers=workers, precision=precision, steps=steps))
        records = RunFolder(run).metrics()
    return statistics.median(record["images_per_second"] for record in records if record["step"] > WARM_UP)


def bare(folder: Path, *, workers: int, precision: str, steps: int) -> float:
    """Network, loss and AdamW on batches that are in memory; the median step after the warm-up."""
    assert workers == 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setup = config(folder, "unused", workers=1, precision=precision, steps=steps)
    assert isinstance(setup.objective, DecoderObjectiveConfig)
    stage = setup.objective.stage
    model, process = stage.build(), stage.diffusion.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randint(256, (4, BATCH, 64, 64, 3), dtype=torch.uint8)
    labels = torch.randint(len(stage.classes), (4, BATCH))
    taken = []
    for step in range(steps):
        started = time.perf_counter()
        x_start, timesteps = to_signed(images[step % 4]), torch.randint(process.num_train_timesteps, (BATCH,))
        noise = torch.randn_like(x_start)
        x_t = process.q_sample(x_start, timesteps, noise)
        dropped = {"label": torch.rand(BATCH) < 0.1}
        cond = decoder_condition(stage.model, {"label": labels[step % 4]}, dropped)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            output = model(x_t, timesteps, cond)
        losses = diffusion_loss(
            process, output, x_start=x_start, x_t=x_t, noise=noise, timesteps=timesteps, config=setup.objective.loss
        )
        losses.loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - started)
    return BATCH / statistics.median(taken[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("bare", "platform"), required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    side = bare if arguments.kind == "bare" else platform
    rate = side(arguments.folder, workers=arguments.workers, precision=arguments.precision, steps=arguments.steps)
    print(json.dumps({"images_per_second": rate}))


if __name__ == "__main__":
    main()
