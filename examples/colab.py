"""From pictures to a model and a grid of what it draws: for a notebook with a GPU, or a laptop with patience.

In a notebook (nothing is installed by this script), with a copy of the repository in `unclip`:

    !pip install --quiet --editable './unclip[demo]'
    %cd unclip
    !python examples/colab.py --minutes 30                            # on drawings of OpenMoji
    !python examples/colab.py --minutes 30 --pictures my_pictures     # on NAME.jpg with its caption in NAME.txt
    from IPython.display import Image; Image("runs/colab/pictures/grid.png")

The same command again continues. Pictures of 64 and 256 pixels, by the networks of recipe demo, on a GPU where there
is one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from unclip.cluster.embed import EmbedConfig, run_embed
from unclip.cluster.fit import fit
from unclip.cluster.generate import run_generate
from unclip.cluster.ingest import IngestConfig, run_ingest
from unclip.cluster.jobs import exit_status
from unclip.cluster.session import session
from unclip.config.base import Config
from unclip.config.cli import parse_flags
from unclip.data.manifest import scan
from unclip.data.openmoji import PrepareConfig, prepare
from unclip.generation.bulk.config import GenerateConfig
from unclip.pipelines.stages import StageName
from unclip.recipes import RECIPES
from unclip.training.run_folder import RunFolder
from unclip.utils import storage

SHARES: dict[StageName, float] = {"clip": 0.15, "prior": 0.1, "decoder": 0.6, "upsampler_256": 0.15}
"""How the time of training is shared out; the decoder decides what the pictures show."""


class ColabConfig(Config):
    """What to train on, for how long, and what to draw."""

    pictures: str = ""
    """Folder of pictures, each with its caption in a text file of the same name; empty: drawings of OpenMoji."""
    minutes: float = Field(default=20.0, gt=0)
    """Time of training; starting the stages takes a few minutes more."""
    prompts: tuple[str, ...] = ("a red heart", "a blue circle", "the flag of Spain", "a brown square")
    """What is drawn in the end."""
    out: str = "runs/colab"
    """Folder of everything that is made."""
    drawings: int = Field(default=400, ge=1)
    """Drawings of OpenMoji, where there are no other pictures."""
    recipe: Literal["demo", "debug"] = "demo"
    """Recipe of every stage; debug takes two steps of each and leaves the upsampler out, to see that everything works."""


def make(config: ColabConfig) -> str:
    """Trains the stages on the pictures and draws the prompts; returns the grid's path. Keeps what is there already."""
    small, large = _records(config)
    embedded, bundle = storage.join(config.out, "embedded"), storage.join(config.out, "bundle")
    with session():
        _train(config, "clip", small)
        run_embed(EmbedConfig(data=small, out=embedded, clip=storage.join(bundle, "clip")))
        _train(config, "prior", embedded)
        _train(config, "decoder", embedded)
        if config.recipe != "debug":
            _train(config, "upsampler_256", large)
        prompts, pictures = storage.join(config.out, "prompts.txt"), storage.join(config.out, "pictures")
        storage.write_bytes(prompts, "".join(f"{prompt}\n" for prompt in config.prompts).encode())
        run_generate(GenerateConfig(bundle=bundle, prompts=prompts, out=pictures))
    return storage.join(pictures, "grid.png")


def _records(config: ColabConfig) -> tuple[str, str]:
    """Records for pictures of 64 pixels, and for those of 256."""
    if not config.pictures:
        out = storage.join(config.out, "openmoji")
        prepare(PrepareConfig(out=out, sizes=(64, 256), limit=config.drawings))
        return storage.join(out, "64/train"), storage.join(out, "256/train")
    out = storage.join(config.out, "records")
    source = {"kind": "folder", "uri": config.pictures}
    with session():
        run_ingest(IngestConfig.from_dict({"sources": [source], "out": out, "duplicates": {"find": "exact"}}))
    return out, out


def _train(config: ColabConfig, stage: StageName, data: str) -> None:
    """One stage, or nothing where it is trained already."""
    recipe = RECIPES[stage][config.recipe]()
    run, bundle = storage.join(config.out, stage), storage.join(config.out, "bundle")
    batch = min(recipe.loop.global_batch_size, scan(data, ("id",)).rows)
    loop: dict[str, Any] = {"global_batch_size": batch, "microbatch_size": min(recipe.loop.microbatch_size, batch)}
    if config.recipe == "demo":
        finished = RunFolder(run).summary()
        loop["time_limit_s"] = finished["seconds"] if finished else 60 * config.minutes * SHARES[stage]
    clip = storage.join(bundle, "clip") if stage in ("prior", "decoder") else None
    fit(recipe.merged({"run": run, "bundle": bundle, "clip": clip, "data": {"path": data}, "loop": loop}))


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_flags(__doc__ or "", ColabConfig, argv)
    return exit_status("colab", lambda: print(make(config)), goes_on="with what is missing")


if __name__ == "__main__":
    sys.exit(main())
