"""A training of two steps from end to end: records, stream, workers, checkpoint, bundle, a picture; nothing of it stays."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from unclip.cluster.checkup.nodes import Place
from unclip.cluster.fit import fit
from unclip.data.ingest.shards import write_tables
from unclip.pipelines.pipeline import Pipeline
from unclip.training.config import TrainConfig
from unclip.utils import storage

_RECORDS, _SIDE = 32, 64
_COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


def write_records(uri: str) -> None:
    """Plain pictures and what they show, as an ingest leaves them."""
    colours = [list(_COLOURS)[index % len(_COLOURS)] for index in range(_RECORDS)]
    table = pa.table(
        {
            "id": pa.array(range(_RECORDS), pa.int64()),
            "image": pa.array([_png(_COLOURS[colour]) for colour in colours], pa.large_binary()),
            "caption": [f"a {colour} square" for colour in colours],
        }
    )
    write_tables(storage.join(uri, "data-00000.parquet"), table.schema, [table])


def _png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), colour).save(buffer, "PNG")
    return buffer.getvalue()


def trial_of(
    recipe: TrainConfig, folder: str, places: Sequence[Place], labels: Mapping[str, str], limit_s: float
) -> TrainConfig:
    """`recipe` on those records, by two workers on two nodes where there are so many."""
    usable = [place for place in places if labels.items() <= place.labels.items()]
    gpus = sum(place.gpus for place in usable)
    room = gpus or sum(place.cpus for place in places) - 1
    return recipe.merged(
        {
            "run": storage.join(folder, "run"),
            "bundle": storage.join(folder, "bundle"),
            "data": {"path": storage.join(folder, "records")},
            "resources": {
                "num_workers": 2 if room >= 2 else 1,
                "placement": "SPREAD",
                "node_labels": dict(labels),
                "wait_s": limit_s / 2,  # what is missing is better to know than that time is over
                "max_failures": 0,
            },
        }
    )


def train(config: TrainConfig) -> str:
    """Trains on records that it makes; what came of it, in words. Raises what `fit` raises."""
    write_records(config.data.path)
    started = time.monotonic()
    summary = fit(config)
    workers = config.resources.num_workers
    return f"{summary['step']} steps by {workers} workers, checkpoint and bundle in {time.monotonic() - started:.0f} s"


def draw(bundle: str) -> list[int]:
    """Shape of a picture that the trained stage draws. Raises where it is not one."""
    pictures = Pipeline.from_bundle(bundle)(["a red square"], [0]).images
    (picture,) = pictures[max(pictures)]
    if not np.ptp(picture):
        raise ValueError("the picture that the trained stage drew is of one colour")
    return list(picture.shape)
