"""TensorBoard, Weights & Biases and MLflow hold what the run folder says: read back from what they wrote."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.support.run_records import add_validation, record, restart, run_config
from tests.support.s3 import object_store
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from unclip.training.config import TrainConfig
from unclip.training.reporting import tensorboard
from unclip.training.reporting.config import MlflowConfig, WandbConfig
from unclip.training.reporting.mlflow import MlflowView
from unclip.training.reporting.run_tail import RunTail
from unclip.training.reporting.tensorboard import TensorBoardView
from unclip.training.reporting.view import View, run_id
from unclip.training.reporting.wandb import WandbView
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_store() as store:
        yield store.uri


def written(uri: str) -> RunFolder:
    """Three records, one of them not finite, a validation of the first that came late, and a restart."""
    run = RunFolder(uri)
    for step in (1, 2):
        run.append(run.metrics_uri, record(step))
    run.append(run.metrics_uri, record(3, loss=float("nan")))
    run.append(run.restarts_uri, restart(1))
    add_validation(run, 1, 0.75)
    return run


def show(view: View, config: TrainConfig, run: RunFolder) -> None:
    """One driver's life."""
    view.open(config)
    view.show(RunTail(run).look())
    view.close()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_tensorboard(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    uri = str(tmp_path / "run") if place == "local" else f"{request.getfixturevalue('bucket')}/tensorboard/run"
    run = written(uri)
    show(TensorBoardView(), run_config(uri), run)
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in storage.names(f"{uri}/tensorboard"):
        (folder / name).write_bytes(storage.read_bytes(f"{uri}/tensorboard/{name}"))
    assert scalars(folder, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert scalars(folder, "train/images_per_second") == [(1, 4.0), (2, 4.0), (3, 4.0)]
    assert scalars(folder, "time/backward") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert scalars(folder, "validation/loss") == [(1, 0.75)]
    events = EventAccumulator(str(folder)).Reload()
    picture = events.Images("samples")[0]
    assert (picture.step, picture.width, picture.height) == (1, 4, 2)
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert '"stage": "prior"' in texts["config/text_summary"]
    assert "signal 9" in texts["restarts/text_summary"]


def test_tensorboard_holds_each_step_once_whatever_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second driver finds the files of a first one; both wrote several parts."""
    monkeypatch.setattr(tensorboard, "PART_RECORDS", 2)
    run, config = written(str(tmp_path)), run_config(str(tmp_path))
    show(TensorBoardView(), config, run)
    for step, loss in ((2, 7.0), (3, 8.0), (4, 9.0), (5, 10.0)):  # a restart takes steps 2 and 3 back
        run.append(run.metrics_uri, record(step, loss=loss))
    show(TensorBoardView(), config, run)
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(1, 1.0), (2, 7.0), (3, 8.0), (4, 9.0), (5, 10.0)]
    assert len(storage.names(str(tmp_path / "tensorboard"))) == 3


def test_wandb_offline(tmp_path: Path) -> None:
    run, config = written(str(tmp_path)), run_config(str(tmp_path))
    show(WandbView(WandbConfig(project="paper", mode="offline")), config, run)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    records = list(wandb_records(file))
    (started, *_) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (started.run_id, started.project) == (run_id(config), "paper")
    assert {item.key: item.value_json for item in started.config.update}["stage"] == '"prior"'
    rows = [
        {item.key or "/".join(item.nested_key): item.value_json for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [(row["train/step"], row.get("train/loss")) for row in rows if "train/step" in row] == [
        ("1", "1"),
        ("2", "0.5"),
        ("3", None),
    ]
    assert [(r["validation/step"], r["validation/loss"]) for r in rows if "validation/step" in r] == [("1", "0.75")]
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert axes["validation/*"] == "validation/step"
    (picture,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images/validation/samples_*.png")
    assert Image.open(picture).size == (4, 2)


def wandb_records(file: Path) -> Iterator[Any]:
    """What an offline run holds: a LevelDB log (7 bytes of header, blocks of 32 KiB, chunks of crc, length, kind)."""
    content, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last
            yield WandbRecord.FromString(parts)
            parts = b""


def test_mlflow_is_one_run_over_two_drivers(tmp_path: Path) -> None:
    run, config = written(str(tmp_path / "run")), run_config(str(tmp_path / "run"))
    settings = MlflowConfig(tracking_uri=str(tmp_path / "mlflow"), experiment="paper")
    show(MlflowView(settings), config, run)
    run.append(run.metrics_uri, record(4))
    show(MlflowView(settings), config, run)
    client = mlflow.MlflowClient(tracking_uri=settings.tracking_uri)
    experiment = client.get_experiment_by_name("paper")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.data.params["stage"], found.data.tags["restarts"]) == ("FINISHED", "prior", "1")

    def history(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]

    assert history("train/loss") == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert history("validation/loss") == [(1, 0.75)]
    samples = Path(client.download_artifacts(found.info.run_id, "samples/step-00000001.png", str(tmp_path)))
    assert np.asarray(Image.open(samples))[0, 0].tolist() == [200, 100, 0]


def test_a_run_is_known_by_its_address(tmp_path: Path) -> None:
    here, there = run_config("s3://bucket/run"), run_config("s3://bucket/other")
    assert run_id(here) == run_id(run_config("s3://bucket/run/")) != run_id(there)
