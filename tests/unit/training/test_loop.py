"""The loop on real OpenMoji records in one process: every stage trains, continues exactly, ends as it should, exports."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.embedded import embed, save_clip
from tests.support.streams import local_batches

from unclip.diffusion.samplers import SamplingConfig
from unclip.models.clip import load_clip
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.text_to_image import Pipeline
from unclip.recipes import RECIPES
from unclip.recipes.clip import tiny_architecture
from unclip.training import checkpoint, loop
from unclip.training.checkpoint import CheckpointError, FragmentReader
from unclip.training.export import full_state_dict
from unclip.training.loop import Batches, Trainer, TrainingDiverged
from unclip.training.objectives.clip import ClipObjective
from unclip.training.publish import publish
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun, prepare_run
from unclip.training.zero_state import KINDS

CPU = torch.device("cpu")
Records = dict[str, str]
"""Folders: `64` and `256` with pictures, `embedded` with embeddings too, and `clip`, which made those."""


@pytest.fixture(scope="module")
def records(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Records:
    root = tmp_path_factory.mktemp("loop")
    clip = save_clip(str(root), tiny_architecture())
    pictures = {size: f"{openmoji}/{size}/train" for size in ("64", "256")}
    return pictures | {"clip": clip, "embedded": embed(pictures["64"], str(root / "embedded"), clip)}


def prepare(stage: str, root: Path, records: Records, **changes: Any) -> PreparedRun:
    """The stage's debug recipe with all its paths under `root`."""
    needs_clip = stage in ("prior", "decoder")
    data = records["embedded"] if needs_clip else records["64" if stage == "clip" else "256"]
    places = {
        "run": str(root / stage),
        "bundle": str(root / "bundle"),
        "data": {"path": data},
        "clip": records["clip"] if needs_clip else None,
    }
    return prepare_run(RECIPES[stage]["debug"]().merged(places).merged(changes))  # type: ignore[index]


def start(prepared: PreparedRun) -> Trainer:
    """As a worker starts: a new trainer that goes on from what the run folder holds."""
    RunFolder(prepared.config.run).open(prepared.config)
    trainer = Trainer(prepared.config, rank=0, device=CPU)
    newest = checkpoint.latest(trainer.run.checkpoints_uri)
    if newest is not None:
        trainer.resume(newest)
    return trainer


def run(prepared: PreparedRun) -> dict[str, Any]:
    trainer = start(prepared)
    return trainer.train(local_batches(prepared, start=trainer.clock.samples_seen))


def stored(prepared: PreparedRun) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of the newest checkpoint."""
    newest = checkpoint.latest(RunFolder(prepared.config.run).checkpoints_uri)
    assert newest is not None
    with FragmentReader(newest, verify=True) as reader:
        return {
            f"{kind}/{name}": reader.read(name, kind, 0, math.prod(shape))
            for name, shape in newest.shapes.items()
            for kind in KINDS
        }


def objective_state(prepared: PreparedRun) -> dict[str, torch.Tensor]:
    """That of the newest checkpoint, as its manifest lists it."""
    newest = checkpoint.latest(RunFolder(prepared.config.run).checkpoints_uri)
    assert newest is not None
    with FragmentReader(newest) as reader:
        return {name: reader.read_objective(name) for name in newest.manifest["objective"]}


def metrics(prepared: PreparedRun) -> list[dict[str, Any]]:
    """What was logged, without what the clock says."""
    timed = ("time_", "seconds", "images_per_second", "eta_s", "progress", "max_steps")
    records = RunFolder(prepared.config.run).metrics()
    return [{name: value for name, value in record.items() if not name.startswith(timed)} for record in records]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# --- the whole chain --------------------------------------------------------------------------------------------------


def test_every_stage_trains_and_the_bundle_makes_pictures(tmp_path: Path, records: Records) -> None:
    clip = prepare("clip", tmp_path, records)
    summary = run(clip)
    publish(clip.config)
    source = str(tmp_path / "bundle" / "clip")
    embedded = embed(records["64"], str(tmp_path / "embedded"), source)
    chained = records | {"clip": source, "embedded": embedded}
    for stage in ("prior", "decoder", "upsampler_256", "upsampler_1024"):
        prepared = prepare(stage, tmp_path, chained)
        before = start(prepared).objective.model.state_dict()
        summary = run(prepared)
        assert (summary["step"], summary["samples_seen"], summary["stage"]) == (2, 8, stage)
        assert summary["parameters"] == sum(tensor.numel() for tensor in before.values())
        assert [record["step"] for record in metrics(prepared)] == [1, 2]
        assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in metrics(prepared))
        publish(prepared.config)
        _check_published(prepared)

    bundle = Bundle.load(str(tmp_path / "bundle"))
    assert bundle.load_clip().fingerprint == load_clip(source).fingerprint
    output = Pipeline.from_bundle(bundle)(["a red heart", "a cat"], [1, 2])
    assert {size: picture.shape for size, picture in output.images.items()} == {
        size: (2, size, size, 3) for size in (64, 256, 1024)
    }
    assert output.image_embed.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def _check_published(prepared: PreparedRun) -> None:
    """The bundle has the moving average, not the last weights, and says where it comes from."""
    config = prepared.config
    newest = checkpoint.latest(RunFolder(config.run).checkpoints_uri)
    assert newest is not None
    assert config.bundle is not None
    bundle = Bundle.load(config.bundle)
    published = dict(bundle.load_model(config.stage).state_dict())
    assert same(published, full_state_dict(newest, "ema"))
    assert not same(published, full_state_dict(newest, "fp32"))
    manifest = bundle.manifests[config.stage]
    assert (manifest.clip.fingerprint if manifest.clip else None) == config.clip_fingerprint
    assert (manifest.provenance["step"], manifest.provenance["run"]) == (2, config.run)
    assert bundle.configs[config.stage] == config.objective.stage_config()


def test_nothing_is_exported_before_there_is_a_checkpoint(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records)
    with pytest.raises(CheckpointError, match="has no checkpoint to export"):
        publish(prepared.config)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_run_in_two_halves_is_the_run_in_one(tmp_path: Path, records: Records) -> None:
    """To the bit, with dropout, gradient accumulation, and an epoch (12 steps of 4) that ends on the way."""
    changes: dict[str, Any] = {
        "objective": {"stage": {"model": {"unet": {"dropout": 0.2}}}},
        "optimizer": {"warmup_steps": 3, "grad_clip": 1.0},
    }
    whole = prepare("decoder", tmp_path / "whole", records, **changes, loop={"max_steps": 14})
    run(whole)
    half = prepare("decoder", tmp_path / "halves", records, **changes, loop={"max_steps": 7})
    run(half)
    rest = prepare("decoder", tmp_path / "halves", records, **changes, loop={"max_steps": 14})
    assert start(rest).clock.samples_seen == 28
    summary = run(rest)
    assert (summary["step"], summary["samples_seen"]) == (14, 56)
    assert metrics(rest) == metrics(whole)
    assert len(metrics(whole)) == 14
    assert same(stored(rest), stored(whole))
    assert not same(stored(rest), {key: torch.zeros_like(value) for key, value in stored(rest).items()})
    assert run(rest)["step"] == 14  # there is nothing left to do, and no batch is asked for
    assert same(stored(rest), stored(whole))


LOSS_AWARE: dict[str, Any] = {
    "loss": {"timestep_sampling": "loss_aware"},
    "stage": {"diffusion": {"num_train_timesteps": 2}, "sampling": {"num_inference_steps": 2}},
}
"""Two timesteps have ten losses each after some six steps of four samples."""


def test_what_loss_aware_draws_have_learned_is_part_of_a_run(tmp_path: Path, records: Records) -> None:
    """Halves stop while draws are uniform and when they no longer are; the history goes on in either case."""
    whole = prepare("decoder", tmp_path / "whole", records, objective=LOSS_AWARE, loop={"max_steps": 14})
    run(whole)
    losses, seen = (objective_state(whole)[name] for name in ("losses", "losses_seen"))
    assert losses.shape == (2, 10)
    assert (losses > 0).all()
    assert int(seen.sum()) == 56
    for half in (3, 9):
        for steps in (half, 14):
            halves = prepare("decoder", tmp_path / f"{half}", records, objective=LOSS_AWARE, loop={"max_steps": steps})
            run(halves)
            assert int(objective_state(halves)["losses_seen"].sum()) == 4 * steps
        assert metrics(halves) == metrics(whole)
        assert same(stored(halves), stored(whole))
        assert same(objective_state(halves), objective_state(whole))
    uniform: dict[str, Any] = LOSS_AWARE | {"loss": {}}
    other = prepare("decoder", tmp_path / "uniform", records, objective=uniform, loop={"max_steps": 14})
    run(other)
    assert objective_state(other) == {}


def test_a_killed_run_logs_nothing_twice(tmp_path: Path, records: Records) -> None:
    """It dies in step 4, its newest checkpoint is of step 2."""
    changes: dict[str, Any] = {"loop": {"max_steps": 6, "keep_checkpoints": 9}}
    prepared = prepare("prior", tmp_path, records, **changes)
    with pytest.raises(RuntimeError, match="killed"):
        start(prepared).train(_killed(local_batches(prepared), after=4))
    assert len(metrics(prepared)) == 4
    run_folder = RunFolder(prepared.config.run)
    for step in (3, 4):
        (Path(checkpoint.folder(run_folder.checkpoints_uri, step)) / "manifest.json").unlink()
    assert start(prepared).clock.step == 2
    run(prepared)
    assert len((Path(prepared.config.run) / "metrics.jsonl").read_text().splitlines()) == 8
    other = prepare("prior", tmp_path / "undisturbed", records, **changes)
    run(other)
    assert [record["step"] for record in metrics(prepared)] == [1, 2, 3, 4, 5, 6]
    assert metrics(prepared) == metrics(other)
    assert same(stored(prepared), stored(other))


def _killed(batches: Batches, *, after: int) -> Batches:
    yield from itertools.islice(batches, after)
    raise RuntimeError("killed")


def test_metrics_are_means_over_the_window(tmp_path: Path, records: Records) -> None:
    every = prepare("prior", tmp_path / "every", records, loop={"max_steps": 7})
    windows = prepare("prior", tmp_path / "windows", records, loop={"max_steps": 7, "log_every": 3})
    for prepared in (every, windows):
        run(prepared)
    losses = [record["loss"] for record in metrics(every)]
    assert [record["step"] for record in metrics(windows)] == [3, 6, 7]
    expected = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert [record["loss"] for record in metrics(windows)] == pytest.approx(expected, rel=1e-6)
    progress = json.loads((Path(windows.config.run) / "progress.json").read_text())
    assert (progress["step"], progress["progress"], progress["samples_seen"]) == (7, 1.0, 28)


def test_only_the_newest_checkpoints_stay(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 5, "keep_checkpoints": 2})
    run(prepared)
    folder = Path(RunFolder(prepared.config.run).checkpoints_uri)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]


# --- ending -----------------------------------------------------------------------------------------------------------


def test_time_ends_a_run_and_is_not_counted_twice(tmp_path: Path, records: Records) -> None:
    limited: dict[str, Any] = {"max_steps": 10**6, "time_limit_s": 0.1}
    prepared = prepare("prior", tmp_path, records, loop=limited)
    first = run(prepared)
    assert first["seconds"] >= 0.1
    last_step = metrics(prepared)[-1]["step"]
    assert 0 < first["step"] == last_step < 10**6

    trainer = start(prepared)
    assert trainer.clock.seconds == first["seconds"]
    assert trainer.train(iter(()))["step"] == first["step"]  # the time is spent: no batch is asked for

    longer = prepare("prior", tmp_path, records, loop=limited | {"time_limit_s": first["seconds"] + 0.1})
    trainer = start(longer)
    second = trainer.train(local_batches(longer, start=trainer.clock.samples_seen))
    assert second["step"] > first["step"]
    assert second["seconds"] >= first["seconds"] + 0.1
    phases = sum(second["time_s"][name] for name in ("data", "forward", "backward", "optimizer"))
    assert phases <= second["seconds"] - first["seconds"] + 0.01  # what came before the restart is in there once


def _spoiled(batches: Batches, bad_steps: set[int]) -> Iterator[dict[str, torch.Tensor]]:
    for step, batch in enumerate(batches):
        yield batch | {"image_embed": batch["image_embed"] * (math.nan if step in bad_steps else 1.0)}


def test_a_run_without_finite_gradients_ends_with_an_error(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 50})
    trainer = start(prepared)
    batches = _spoiled(local_batches(prepared), set(range(3, 50)))
    with pytest.raises(TrainingDiverged, match=r"10 steps in a row, up to step 12: lower optimizer\.learning_rate"):
        trainer.train(batches)
    assert loop.MAX_SKIPPED_STEPS == 10
    diverged = stored(prepared)
    assert all(value.isfinite().all() for value in diverged.values())
    three = prepare("prior", tmp_path / "three", records, loop={"max_steps": 3})
    run(three)
    assert same(diverged, stored(three))
    assert trainer.engine.steps == 3


def test_a_run_outlives_fewer_bad_steps(tmp_path: Path, records: Records) -> None:
    prepared = prepare("prior", tmp_path, records, loop={"max_steps": 20})
    bad = set(range(9)) | set(range(10, 19))
    trainer = start(prepared)
    assert trainer.train(_spoiled(local_batches(prepared), bad))["step"] == 20
    assert trainer.engine.steps == 2


# --- sharpness-aware minimisation through DeepSpeed -------------------------------------------------------------------


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_sharpness_aware_steps_update_the_weights_from_before_the_ascent(
    tmp_path: Path, records: Records, zero_stage: int
) -> None:
    """One step of two micro-batches against AdamW on the mean of their gradients, each taken uphill on its own."""
    prepared = prepare(
        "clip", tmp_path, records, objective={"sam_rho": 0.05}, loop={"max_steps": 1}, zero={"stage": zero_stage}
    )
    config = prepared.config
    torch.manual_seed(config.seed)
    objective = config.objective.build()
    assert isinstance(objective, ClipObjective)
    model = objective.model
    batch = next(local_batches(prepared))
    for first in (0, 2):
        micro = {name: tensor[first : first + 2] for name, tensor in batch.items()}
        (objective.loss(model, micro, None).loss / 2).backward()  # type: ignore[arg-type]
        objective.after_backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    config.optimizer.build(model).step()

    run(prepared)
    assert metrics(prepared)[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    newest = checkpoint.latest(RunFolder(config.run).checkpoints_uri)
    assert newest is not None
    trained = full_state_dict(newest, "fp32")
    for name, parameter in model.named_parameters():
        # Adam's first step is the gradient's sign: elements whose gradient is rounding error may go either way.
        clear = parameter.grad.abs() > 1e-6 if parameter.grad is not None else None
        torch.testing.assert_close(trained[name][clear], parameter.detach()[clear], atol=2e-5, rtol=1e-5)


def test_sampling_settings_of_the_recipe_travel(tmp_path: Path, records: Records) -> None:
    """What a recipe says about sampling is what the pipeline does unless told otherwise."""
    prepared = prepare("prior", tmp_path, records, objective={"stage": {"sampling": {"num_inference_steps": 3}}})
    run(prepared)
    publish(prepared.config)
    published = Bundle.load(str(tmp_path / "bundle")).configs["prior"]
    assert published.sampling == SamplingConfig(num_inference_steps=3)  # type: ignore[union-attr]
