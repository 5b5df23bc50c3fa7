"""Pictures of the same prompts and seeds at every point of a grid of guidance scales and numbers of steps, each point judged.

A point is a job of `generate` and one of `evaluate` with folders of their own, each of which goes on where it was stopped: so
does the sweep, and a grid that has grown makes what is new. What they are compared with is made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

from pydantic import Field, model_validator

from unclip.cluster import session
from unclip.cluster.evaluate import run_evaluate
from unclip.cluster.generate import run_generate
from unclip.config.base import Config, ConfigError
from unclip.evaluation.config import EvaluatePicturesConfig
from unclip.evaluation.feature_folder import FeatureFolder
from unclip.evaluation.pictures import open_pictures
from unclip.evaluation.subjects.pictures import check_compared
from unclip.evaluation.sweep_page import SweepPoint, numbers, sweep_page, title_of
from unclip.generation.bulk.config import GenerateConfig
from unclip.utils import storage

_RESULT, _REPORT = "result.json", "report.html"
_STAGES, _FIELDS = ("decoder", "prior"), ("guidance_scale", "num_inference_steps")
_OURS = {"generate": ("out",), "evaluate": ("out", "pictures", "reference")}
"""Fields of the two jobs that the sweep itself sets."""


class StageGrid(Config):
    """Values that a stage's sampling takes; empty: as the bundle, or `generate.options`, has it."""

    guidance_scale: tuple[float, ...] = ()
    """Classifier-free guidance; 1 is off."""
    num_inference_steps: tuple[int, ...] = ()
    """Numbers of network evaluations."""


class SweepConfig(Config):
    """Which pictures to make and judge at which points."""

    generate: GenerateConfig = GenerateConfig(format="parquet")
    """Bundle, prompts, seed and everything else that all points share; its `out` is the sweep's."""
    evaluate: EvaluatePicturesConfig = EvaluatePicturesConfig()
    """CLIP and metrics; its `pictures`, `reference` and `out` are the sweep's."""
    reference: str | None = None
    """Pictures that those of every point should be like: records, or features of an earlier evaluation; null leaves out
    every metric that compares two sets."""
    decoder: StageGrid = StageGrid()
    """The decoder's axes of the grid."""
    prior: StageGrid = StageGrid()
    """The prior's."""
    out: str = ""
    """Folder for the points, the result and the page; required. The same job run again makes what is missing."""
    show: int = Field(default=6, ge=0)
    """Prompts whose pictures are on the page."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for job, fields in _OURS.items():
            for field in fields:
                if value := getattr(getattr(self, job), field):
                    raise ValueError(f"{job}.{field} = {value!r}: the sweep sets it; leave it out")
        if self.generate.format == "folder":
            raise ValueError("generate.format = 'folder': single files cannot be judged; parquet or webdataset")
        for axis, values in self.axes.items():
            if len(set(values)) != len(values):
                raise ValueError(f"{axis} = {list(values)}: has a value twice")
        return self

    @property
    def axes(self) -> dict[str, tuple[float, ...]]:
        """The values of what is swept, by its name: guidance first."""
        names = [(stage, field) for field in _FIELDS for stage in _STAGES]
        found = {f"{stage}.{field}": getattr(getattr(self, stage), field) for stage, field in names}
        return {axis: values for axis, values in found.items() if values}

    def points(self) -> Iterator[Point]:
        """All combinations; the last axis changes fastest."""
        for values in product(*self.axes.values()):
            yield Point(self, dict(zip(self.axes, values, strict=True)))


@dataclass(frozen=True)
class Point:
    """One setting of a sweep.

    Args:
        settings: the value of each axis, by its name.
    """

    sweep: SweepConfig
    settings: dict[str, float]

    @property
    def uri(self) -> str:
        name = "_".join(f"{axis}-{value:g}" for axis, value in self.settings.items())
        return storage.join(self.sweep.out, "points", name)

    @property
    def generate(self) -> GenerateConfig:
        """The job that makes its pictures."""
        options: dict[str, dict[str, float]] = {}
        for axis, value in self.settings.items():
            stage, field = axis.split(".")
            options.setdefault(stage, {})[field] = value
        return self.sweep.generate.merged({"out": storage.join(self.uri, "pictures"), "options": options})

    def evaluate(self, shared: dict[str, str | None]) -> EvaluatePicturesConfig:
        """The job that judges them, by features that are `shared` with the other points."""
        changes = {"pictures": self.generate.out, "out": storage.join(self.uri, "evaluation")}
        return self.sweep.evaluate.merged(changes | shared)


def run_sweep(config: SweepConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Makes and judges the points that are missing, writes result and page, and returns the result; a dry run checks every
    point and returns `points`, and `prompts` of each.

    Raises what `run_generate` and `run_evaluate` raise, those of points that are bad before any is made.
    """
    if not config.out:
        raise ConfigError("out: required, but not given")
    if not config.axes:
        raise ConfigError("decoder, prior: no values to sweep; set decoder.guidance_scale=[1,2,4], for example")
    session.refuse_lost_paths({"out": config.out, "reference": config.reference})
    config = config.merged({"out": storage.absolute(config.out)})
    prompts = _check(config)
    points = list(config.points())
    if dry_run:
        return {"points": len(points), "prompts": prompts}
    result_uri = storage.join(config.out, _RESULT)
    if storage.exists(result_uri) and (found := storage.read_json(result_uri))["config"] == config.to_dict():
        return dict(found)
    with session.session():
        shared = _shared_features(config)
        made = [_make(point, shared) for point in points]
    result = {"config": config.to_dict(), "points": made}
    drawn = [
        SweepPoint(point.settings, numbers(found["metrics"]), _first_pictures(point.generate.out, config.show))
        for point, found in zip(points, made, strict=True)
    ]
    page = sweep_page(f"Sweep of {config.generate.bundle}", drawn)
    storage.write_bytes(storage.join(config.out, _REPORT), page.html().encode())
    storage.write_json(result_uri, result)
    return result


def _check(config: SweepConfig) -> int:
    """Finds what is wrong with any point before one is made; how many prompts there are."""
    prompts = 0
    for point in config.points():
        try:
            prompts = run_generate(point.generate, dry_run=True)["prompts"]
        except ConfigError as error:
            raise ConfigError(f"generate.{error} (at {title_of(point.settings)})") from None
    try:
        check_compared(config.evaluate.merged({"reference": config.reference}))
        if (judged := _judged_reference(config)) is not None:
            run_evaluate(judged, dry_run=True)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith("reference") else f"evaluate.{error}") from None
    return prompts


def _judged_reference(config: SweepConfig) -> EvaluatePicturesConfig | None:
    """The job that makes the reference's features, by judging its pictures alone; None where they are there or not asked for."""
    if config.reference is None or FeatureFolder(config.reference).protocol() is not None:
        return None
    changes = {"pictures": config.reference, "judge": None, "out": storage.join(config.out, "reference")}
    return config.evaluate.merged(changes)


def _shared_features(config: SweepConfig) -> dict[str, str | None]:
    """Where features are that every point is compared with, made once, by the field of the evaluation that they are for."""
    judged = _judged_reference(config)
    if judged is None:
        return {"reference": config.reference}
    run_evaluate(judged)
    features = storage.join(judged.out, "features")
    found: dict[str, str | None] = {"reference": storage.join(features, "pictures")}
    training = storage.join(features, "training")
    return found | ({"training": training} if FeatureFolder(training).protocol() is not None else {})


def _make(point: Point, shared: dict[str, str | None]) -> dict[str, Any]:
    manifest = run_generate(point.generate)
    return {
        "settings": point.settings,
        "pictures": manifest["counts"]["pictures"],
        "seconds_per_picture": manifest["seconds"] / max(1, manifest["counts"]["pictures"]),
        "metrics": run_evaluate(point.evaluate(shared))["metrics"],
    }


def _first_pictures(uri: str, count: int) -> dict[str, bytes]:
    """The first picture of each of the first prompts, encoded, by prompt."""
    pictures, found = open_pictures("pictures", uri), dict[str, bytes]()
    for fragment in range(len(pictures.rows)):
        if len(found) >= count:
            break
        table = pictures.read(fragment)
        for caption, image in zip(table.column("caption").to_pylist(), table.column("image"), strict=True):
            if len(found) < count and caption not in found:
                found[caption] = image.as_py()
    return found
