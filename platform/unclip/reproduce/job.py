"""A whole reproduction, step by step: data, CLIP and judge, then for each seed its networks and what they draw.

    OUT/config.json                 what it was begun with
        data/{train,heldout}        drawn shapes, where no records were given
        networks/{clip,judge}       bundles
        embedded/{train,heldout}    the records with z_i and z_t
        seed-0/networks/NAME        a bundle for each network of `variants.NETWORKS`
               drawn/NAME.safetensors, NAME.png    z_i that were drawn; some of the pictures
               measured/NAME.json   metrics
        runs/                       run folders; their checkpoints go when the network is there
        result.json, report.html    at the end

A step is done when its file is there, and a network that was killed goes on from its checkpoint: so the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

from safetensors.torch import load, save

from unclip.config.base import ConfigError
from unclip.data.manifest import FACTS_FILE, scan
from unclip.data.pca import PCA_FILE
from unclip.data.shapes import draw_shapes
from unclip.generation.device import chosen_device
from unclip.models.clip import ClipModel, load_clip
from unclip.reproduce.config import ReproduceConfig
from unclip.reproduce.drawing import Artist, told_embeddings
from unclip.reproduce.judging import Judge
from unclip.reproduce.result import report_page, summarise
from unclip.reproduce.variants import EMBEDDINGS, NETWORKS, PICTURES, Network
from unclip.training.config import TrainConfig
from unclip.training.flops import training_flops
from unclip.training.in_process import embed_here, train_here
from unclip.training.run_folder import RunFolder, versions
from unclip.utils import storage
from unclip.utils.progress import progress_bar

_HELD_OUT_SHARE = 8
_MAY_CHANGE = ("out", "device", "seeds")
"""What a continued reproduction may change."""
Report = Callable[[float], None]
"""report(share of the step that is done)."""


@dataclass(frozen=True)
class Step:
    """Some of the work: done when `file` is there.

    Args:
        cost: FLOPs, for the time that is left.
    """

    name: str
    file: str
    cost: float
    work: Callable[[Report], None]

    @property
    def is_done(self) -> bool:
        return storage.exists(self.file)


class Reproduction:
    """A reproduction whose settings were all found right.

    Raises `ConfigError` or `DataError` naming the field where they are not, or where `out` was begun with others, and
    `OSError` where it cannot be written.
    """

    def __init__(self, config: ReproduceConfig) -> None:
        if not config.out:
            raise ConfigError("out: required, but not given")
        self.config = config.merged(
            {"out": storage.absolute(config.out), "data": storage.absolute(config.data) if config.data else None}
        )
        self.device = chosen_device(config.device)
        if config.data is not None:
            for split in ("train", "heldout"):
                scan(self._records(split), ("id", "image", "caption"))
        storage.check_writable(self.config.out)
        self._check_same()
        self._flops = {base: training_flops(getattr(config, base)) for base in ("clip", "prior", "ar_prior", "decoder")}
        self.steps = list(self._steps())

    def run(self) -> dict[str, Any]:
        """Does what is not done yet, writes the report and, last, the result, which it returns."""
        storage.write_json(self._at("config.json"), self._identity)
        left = [step for step in self.steps if not step.is_done]
        total = sum(step.cost for step in self.steps)
        done = total - sum(step.cost for step in left)
        with progress_bar(_giga(total), "GFLOP", done=_giga(done)) as bar:

            def report(step: Step, share: float) -> None:
                bar.update(_giga(done + share * step.cost) - bar.n)

            for step in left:
                bar.set_description(step.name, refresh=False)
                step.work(partial(report, step))
                report(step, 1.0)
                done += step.cost
        return self._finish()

    def _finish(self) -> dict[str, Any]:
        seeds = range(self.config.seeds)
        names = [*EMBEDDINGS, *PICTURES]
        measured = [{name: storage.read_json(self._measured(seed, name)) for name in names} for seed in seeds]
        result = summarise(measured) | {
            "measured": measured,
            "steps": {base: self._loop_steps(base) for base in self._flops},
            "flops": {base: self._loop_steps(base) * self._batch(base) * self._flops[base] for base in self._flops},
            "config": self.config.to_dict(),
            "versions": versions(),
        }
        mosaics = {"held out": self._judge.mosaic(None)}
        mosaics |= {name: storage.read_bytes(self._at("seed-0", "drawn", f"{name}.png")) for name in PICTURES}
        storage.write_bytes(self._at("report.html"), report_page(result, mosaics).html().encode())
        storage.write_json(self._at("result.json"), result)
        return result

    # --- the steps ----------------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[Step]:
        """In an order in which each finds what it needs."""
        if self.config.data is None:
            for seed, split in enumerate(("train", "heldout")):
                yield Step(split, storage.join(self._records(split), FACTS_FILE), 0, partial(self._draw, split, seed))
        for seed, name in enumerate(("clip", "judge")):
            yield self._training(name, self._clip_config(name, seed))
        for split in ("train", "heldout"):
            yield Step(
                f"embed {split}", storage.join(self._embedded(split), FACTS_FILE), 0, partial(self._embed, split)
            )
        for seed in range(self.config.seeds):
            for name, network in NETWORKS.items():
                yield self._training(f"{name}, seed {seed}", self._network_config(name, network, seed))
            for name in EMBEDDINGS:
                yield Step(
                    f"{name}, seed {seed}",
                    self._measured(seed, name),
                    self._embeddings_cost(name),
                    partial(self._measure_embeddings, seed, name),
                )
            for name in PICTURES:
                yield Step(
                    f"{name}, seed {seed}",
                    self._measured(seed, name),
                    self._pictures_cost(name),
                    partial(self._measure_pictures, seed, name),
                )

    def _draw(self, split: str, seed: int, report: Report) -> None:
        rows = self.config.drawn if split == "train" else max(1, self.config.drawn // _HELD_OUT_SHARE)
        draw_shapes(self._records(split), rows=rows, side=self.config.side, seed=seed)

    def _embed(self, split: str, report: Report) -> None:
        embed_here(self._records(split), self._embedded(split), self._clip_source("clip"), device=str(self.device))

    def _training(self, name: str, config: TrainConfig) -> Step:
        base = "ar_prior" if config.objective.kind == "ar_prior" else config.stage
        cost = self._flops[base] * self._batch(base) * config.loop.max_steps
        assert config.bundle is not None
        manifest = storage.join(config.bundle, config.stage, "manifest.json")
        return Step(name, manifest, cost, partial(self._train, config))

    def _train(self, config: TrainConfig, report: Report) -> None:
        train_here(config, self.device, on_step=lambda step: report(step / config.loop.max_steps))
        storage.remove(RunFolder(config.run).checkpoints_uri)

    def _measure_embeddings(self, seed: int, name: str, report: Report) -> None:
        drawn = self._artist(seed).embeddings(EMBEDDINGS[name])
        storage.write_bytes(self._embeddings_file(seed, name), save({"image_embed": drawn.contiguous()}))
        storage.write_json(self._measured(seed, name), self._judge.embeddings(drawn))

    def _measure_pictures(self, seed: int, name: str, report: Report) -> None:
        wanted = PICTURES[name]
        told, image_embed = told_embeddings(wanted), None
        if told is not None:
            image_embed = load(storage.read_bytes(self._embeddings_file(seed, told)))["image_embed"]
        drawn = self._artist(seed).pictures(wanted, image_embed)
        storage.write_bytes(self._at(f"seed-{seed}", "drawn", f"{name}.png"), self._judge.mosaic(drawn))
        storage.write_json(self._measured(seed, name), self._judge.pictures(drawn))

    # --- what they need -----------------------------------------------------------------------------------------------

    def _clip_config(self, name: str, seed: int) -> TrainConfig:
        places = {"seed": seed, "data": {"path": self._records("train")}}
        return self.config.clip.merged({**self._places(name), **places})

    def _network_config(self, name: str, network: Network, seed: int) -> TrainConfig:
        base: TrainConfig = getattr(self.config, network.base)
        changes: dict[str, Any] = {
            **self._places(name, seed),
            "seed": seed,
            "data": {"path": self._embedded("train")},
            "clip": self._clip_source("clip"),
            "loop": {"max_steps": self._loop_steps(network.base)},
            "objective": dict(network.changes),
        }
        if network.base == "ar_prior":
            changes["objective"]["pca"] = storage.join(self._embedded("train"), PCA_FILE)
        return base.merged(changes)

    def _places(self, name: str, seed: int | None = None) -> dict[str, str]:
        parts = [name] if seed is None else [f"seed-{seed}", name]
        return {"run": self._at("runs", *parts), "bundle": self._bundle(name, seed)}

    def _loop_steps(self, base: str) -> int:
        """As configured; of the autoregressive prior as many as take the diffusion prior's FLOPs."""
        if base != "ar_prior":
            return int(getattr(self.config, base).loop.max_steps)
        flops = self._flops["prior"] * self._batch("prior") * self._loop_steps("prior")
        return max(1, round(flops / (self._flops["ar_prior"] * self._batch("ar_prior"))))

    def _batch(self, base: str) -> int:
        return int(getattr(self.config, base).loop.global_batch_size)

    def _embeddings_cost(self, name: str) -> float:
        wanted = EMBEDDINGS[name]
        base = NETWORKS[wanted.prior].base
        sampling = getattr(self.config, base).objective.stage.sampling
        evaluations = 1 if base == "ar_prior" else sampling.num_inference_steps
        return self._forward(base) * evaluations * wanted.draws

    def _pictures_cost(self, name: str) -> float:
        evaluations = self.config.decoder.objective.stage.sampling.num_inference_steps  # type: ignore[union-attr]
        return self._forward("decoder") * evaluations * (1 if PICTURES[name].guidance_scale == 1 else 2)

    def _forward(self, base: str) -> float:
        """FLOPs of one evaluation for all drawn samples: a third of what training takes."""
        return self._flops[base] / 3 * self.config.captions * self.config.pictures

    @cached_property
    def _judge(self) -> Judge:
        config = self.config
        return Judge(
            self._embedded("heldout"),
            self._clip_source("judge"),
            captions=config.captions,
            pictures=config.pictures,
            side=config.side,
            device=self.device,
        )

    @cached_property
    def _clip(self) -> ClipModel:
        return load_clip(self._clip_source("clip"), self.device)

    def _artist(self, seed: int) -> Artist:
        if self._artist_at_work is None or self._artist_at_work[0] != seed:
            networks = self._at(f"seed-{seed}", "networks")
            artist = Artist(networks, clip=self._clip, captions=self._judge.captions, seed=seed, device=self.device)
            self._artist_at_work = seed, artist
        return self._artist_at_work[1]

    _artist_at_work: tuple[int, Artist] | None = None

    # --- places -------------------------------------------------------------------------------------------------------

    def _at(self, *parts: str) -> str:
        return storage.join(self.config.out, *parts)

    def _records(self, split: str) -> str:
        return self._at("data", split) if self.config.data is None else storage.join(self.config.data, split)

    def _embedded(self, split: str) -> str:
        return self._at("embedded", split)

    def _bundle(self, name: str, seed: int | None) -> str:
        return self._at(*([] if seed is None else [f"seed-{seed}"]), "networks", name)

    def _clip_source(self, name: str) -> str:
        return storage.join(self._bundle(name, None), "clip")

    def _embeddings_file(self, seed: int, name: str) -> str:
        return self._at(f"seed-{seed}", "drawn", f"{name}.safetensors")

    def _measured(self, seed: int, name: str) -> str:
        return self._at(f"seed-{seed}", "measured", f"{name}.json")

    @property
    def _identity(self) -> Mapping[str, Any]:
        settings = {name: value for name, value in self.config.to_dict().items() if name not in _MAY_CHANGE}
        return settings | {
            "networks": {name: asdict(network) for name, network in NETWORKS.items()},
            "embeddings": {name: asdict(drawn) for name, drawn in EMBEDDINGS.items()},
            "pictures": {name: asdict(drawn) for name, drawn in PICTURES.items()},
        }

    def _check_same(self) -> None:
        file = self._at("config.json")
        if not storage.exists(file):
            return
        found = storage.read_json(file)
        changed = [name for name, value in self._identity.items() if found.get(name) != value]
        if changed:
            raise ConfigError(
                f"out = {self.config.out!r}: was begun with another {', '.join(changed)}; choose another folder, or delete it"
            )


def _giga(flops: float) -> int:
    return round(flops / 1e9)
