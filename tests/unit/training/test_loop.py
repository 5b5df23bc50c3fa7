"""The loop on real OpenMoji records in one process: every stage trains, continues exactly, ends as it should, exports."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.loop_runs import (
    LOSS_AWARE,
    Records,
    killed,
    let_saves_end,
    metrics,
    objective_state,
    prepare,
    run,
    same,
    start,
    stored,
)

from unclip.diffusion.samplers import SamplingConfig
from unclip.models.clip import load_clip
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.pipeline import Pipeline
from unclip.training import checkpoint
from unclip.training.checkpoint import CheckpointError
from unclip.training.export import full_state_dict
from unclip.training.in_process import embed_here, local_batches
from unclip.training.objectives.clip import ClipObjective
from unclip.training.publish import publish
from unclip.training.run_folder import RunFolder
from unclip.training.setup import PreparedRun

# --- the whole chain --------------------------------------------------------------------------------------------------


def test_every_stage_trains_and_the_bundle_makes_pictures(tmp_path: Path, records: Records) -> None:
    clip = prepare("clip", tmp_path, records)
    summary = run(clip)
    said = tuple(replace(manifest, facts={"attribution": "Drawn by A."}) for manifest in clip.manifests)
    publish(replace(clip, manifests=said))
    assert replace(clip, manifests=said * 2).attributions == ["Drawn by A."]
    assert Bundle.load(str(tmp_path / "bundle")).attribution == "Drawn by A."
    source = str(tmp_path / "bundle" / "clip")
    embedded = embed_here(records["64"], str(tmp_path / "embedded"), source)
    chained = records | {"clip": source, "embedded": embedded}
    for stage in ("prior", "decoder", "upsampler_256", "upsampler_1024"):
        prepared = prepare(stage, tmp_path, chained)
        before = start(prepared).objective.model.state_dict()
        summary = run(prepared)
        assert (summary["step"], summary["samples_seen"], summary["stage"]) == (2, 8, stage)
        assert summary["parameters"] == sum(tensor.numel() for tensor in before.values())
        assert [record["step"] for record in metrics(prepared)] == [1, 2]
        assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in metrics(prepared))
        publish(prepared)
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
        publish(prepared)


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
        start(prepared).train(killed(local_batches(prepared), after=4))
    let_saves_end()
    assert len(metrics(prepared)) == 4
    run_folder = RunFolder(prepared.config.run)
    for step in (3, 4):
        (Path(checkpoint.folder(run_folder.checkpoints_uri, step)) / "manifest.json").unlink(missing_ok=True)
    assert start(prepared).clock.step == 2
    run(prepared)
    assert len((Path(prepared.config.run) / "metrics.jsonl").read_text().splitlines()) == 8
    other = prepare("prior", tmp_path / "undisturbed", records, **changes)
    run(other)
    assert [record["step"] for record in metrics(prepared)] == [1, 2, 3, 4, 5, 6]
    assert metrics(prepared) == metrics(other)
    assert same(stored(prepared), stored(other))


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
    publish(prepared)
    published = Bundle.load(str(tmp_path / "bundle")).configs["prior"]
    assert published.sampling == SamplingConfig(num_inference_steps=3)  # type: ignore[union-attr]
