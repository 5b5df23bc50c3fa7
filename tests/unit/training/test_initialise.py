"""`init_from`: what a new run may begin with, what it takes over, and what it refuses; and `resume`."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.support.faults import INTERNAL_ERROR, STALL
from tests.support.s3 import ObjectStore, object_store
from torch import nn

from unclip.config.base import ConfigError
from unclip.pipelines.bundle import Bundle, save_stage
from unclip.recipes import RECIPES
from unclip.training import checkpoint, zero_state
from unclip.training.checkpoint import CheckpointError, SaveError
from unclip.training.config import TrainConfig
from unclip.training.engine import Engine, ZeroConfig
from unclip.training.export import full_state_dict
from unclip.training.initialise import check_source, initialise
from unclip.training.optim import OptimizerConfig
from unclip.training.run_folder import RunFolder
from unclip.training.saver import Saver
from unclip.training.setup import check_beginning
from unclip.utils import storage


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """An upsampler, the smallest of all stages, which belongs to no CLIP."""
    places = {"run": str(tmp_path / "new"), "bundle": None, "data": {"path": str(tmp_path / "data")}}
    return RECIPES["upsampler_256"]["debug"]().merged(places)


def engine_of(module: nn.Module, stage: int = 1) -> Engine:
    zero = ZeroConfig(stage=stage, precision="fp32")
    optimizer = OptimizerConfig(learning_rate=0.1)
    return Engine(module, optimizer, zero, microbatch_size=1, accumulation_steps=1, device=torch.device("cpu"))


def build(config: TrainConfig, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return config.objective.stage_config().build()


def save(uri: str, engine: Engine, steps: tuple[int, ...] = (1,)) -> None:
    saver = Saver(uri, engine, facts={}, keep_last=9, keep_every_steps=None, limit_s=60)
    for step in steps:
        saver.start({"step": step}, objective=None)
        saver.wait()


def old_run(config: TrainConfig, uri: str) -> dict[str, torch.Tensor]:
    """A run folder with two checkpoints; returns the averages of the newer one, which differ from the weights."""
    engine = engine_of(build(config, 1))
    save(RunFolder(uri).checkpoints_uri, engine)
    for fragment in zero_state.fragments(engine):
        fragment.tensors["ema"].add_(torch.randn(fragment.numel))
        fragment.tensors["exp_avg"].fill_(3.0)
    engine.steps = 7
    save(RunFolder(uri).checkpoints_uri, engine, (2,))
    newest = checkpoint.latest(RunFolder(uri).checkpoints_uri)
    assert newest
    return full_state_dict(newest)


def as_stage(config: TrainConfig, uri: str, tensors: dict[str, torch.Tensor]) -> str:
    stage = config.objective.stage_config()
    save_stage(uri, stage, tensors=tensors, clip=None, provenance={})
    return storage.join(uri, stage.kind)


Place = Callable[[TrainConfig, str, dict[str, torch.Tensor]], str]
SOURCES: dict[str, Place] = {
    "run": lambda config, root, tensors: storage.join(root, "old"),
    "checkpoint": lambda config, root, tensors: storage.join(root, "old", "checkpoints", "step-00000002"),
    "bundle": lambda config, root, tensors: as_stage(config, storage.join(root, "bundle"), tensors),
}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_run_begins_with_the_averages_of_any_source(
    config: TrainConfig, tmp_path: Path, store: ObjectStore, where: str
) -> None:
    root = str(tmp_path) if where == "local" else f"{store.uri}/{tmp_path.name}"
    expected = old_run(config, storage.join(root, "old"))
    for name, place in SOURCES.items():
        uri = place(config, root, expected)
        check_source(uri, config)
        engine = engine_of(build(config, 2), stage=2)
        initialise(engine, uri)
        assert engine.steps == 0
        for fragment in zero_state.fragments(engine):
            part = expected[fragment.name].flatten()[fragment.start : fragment.start + fragment.numel]
            assert torch.equal(fragment.tensors["fp32"], part), name
            assert torch.equal(fragment.tensors["ema"], part), name
            assert not fragment.tensors["exp_avg"].any(), name
        for key, tensor in engine.module.state_dict().items():
            assert torch.equal(tensor, expected[key]), name


def test_further_input_channels_of_a_convolution_begin_at_zero(tmp_path: Path) -> None:
    old, new = nn.Conv2d(3, 5, 3), nn.Conv2d(7, 5, 3)
    save(str(tmp_path / "checkpoints"), engine_of(old))
    engine = engine_of(new, stage=3)
    initialise(engine, str(tmp_path))
    found = torch.cat([fragment.tensors["ema"] for fragment in zero_state.fragments(engine)])
    grown = torch.cat([old.weight.detach(), torch.zeros(5, 4, 3, 3)], dim=1)
    assert torch.equal(found.sort().values, torch.cat([grown.flatten(), old.bias.detach()]).sort().values)
    x = torch.randn(2, 7, 8, 8)
    plain = nn.Conv2d(7, 5, 3)
    plain.load_state_dict({"weight": grown, "bias": old.bias.detach()})
    output = engine.forward(lambda: type("Output", (), {"loss": new(x).square().mean()})())
    torch.testing.assert_close(output.loss.detach(), plain(x).square().mean().detach())


def test_a_source_that_does_not_fit_is_refused_by_name(config: TrainConfig, tmp_path: Path) -> None:
    tensors = old_run(config, str(tmp_path / "old"))
    stage = as_stage(config, str(tmp_path / "bundle"), tensors)
    with pytest.raises(ConfigError, match=r"init_from = '.*nowhere': is no run folder with a checkpoint"):
        check_source(str(tmp_path / "nowhere"), config)
    with pytest.raises(ConfigError, match=rf"of a bundle, name the stage: {stage}"):
        check_source(str(tmp_path / "bundle"), config)
    wider = config.merged({"objective": {"stage": {"model": {"unet": {"channels": 64}}}}})
    with pytest.raises(ConfigError, match=r"holds another model than stage 'upsampler_256': .* there, .* here"):
        check_source(stage, wider)
    with pytest.raises(CheckpointError, match="holds another model"):
        initialise(engine_of(nn.Linear(2, 2)), stage)
    broken = str(tmp_path / "old" / "checkpoints" / "step-00000002")
    storage.remove(storage.join(broken, "manifest.json"))
    with pytest.raises(ConfigError, match="is an interrupted checkpoint"):
        check_source(broken, config)


def test_damaged_weights_of_a_bundle_are_noticed(config: TrainConfig, tmp_path: Path) -> None:
    stage = Path(as_stage(config, str(tmp_path / "bundle"), build(config, 1).state_dict()))
    content = bytearray((stage / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (stage / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        initialise(engine_of(build(config, 2)), str(stage))
    (stage / "model.safetensors").write_bytes(bytes(content[:-1]))
    with pytest.raises(ConfigError, match=r"init_from = .*model.safetensors has \d+ bytes"):
        check_source(str(stage), config)


def test_resume_may_be_required_or_refused(config: TrainConfig) -> None:
    check_beginning(config.merged({"resume": "refuse"}))
    with pytest.raises(ConfigError, match=r"resume = 'require': run = '.*new' holds no complete checkpoint"):
        check_beginning(config.merged({"resume": "require"}))
    with pytest.raises(ConfigError, match=r"init_from = 'nowhere'"):
        check_beginning(config.merged({"init_from": "nowhere"}))
    save(RunFolder(config.run).checkpoints_uri, engine_of(build(config, 1)), (3,))
    check_beginning(config.merged({"resume": "require"}))
    check_beginning(config.merged({"init_from": "nowhere"}))  # a run that goes on does not begin with anything
    with pytest.raises(ConfigError, match=r"resume = 'refuse': run = '.*new' holds a checkpoint of step 3"):
        check_beginning(config.merged({"resume": "refuse"}))


def test_a_store_that_fails_for_longer_than_the_retries_costs_that_checkpoint(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    engine, uri = engine_of(nn.Linear(3, 3)), f"{store.uri}/outage"
    saver = Saver(uri, engine, facts={}, keep_last=2, keep_every_steps=None, limit_s=60)
    with store.proxy.faults(kinds=(INTERNAL_ERROR,), methods=("PUT", "POST"), most=1000):
        saver.start({"step": 1}, objective=None)
        with pytest.raises(
            CheckpointError, match=r"step 1: rank 0 could not write its part: .*step-00000001/rank-00000"
        ):
            saver.wait()
    saver.start({"step": 2}, objective=None)
    saver.wait()
    assert [outcome.error is None for outcome in saver.finished()] == [False, True]
    assert saver.finished() == []
    assert [found.step for found in checkpoint.committed(uri)] == [2]


def test_a_save_that_hangs_keeps_its_memory_and_is_given_up(store: ObjectStore) -> None:
    engine, uri = engine_of(nn.Linear(3, 3)), f"{store.uri}/hangs"
    saver = Saver(uri, engine, facts={}, keep_last=2, keep_every_steps=None, limit_s=3)
    with store.proxy.faults(kinds=(STALL,), methods=("PUT", "POST"), containing="step-00000001", most=1000):
        for step, message in ((1, "still busy with it after 4 s"), (2, "still writes"), (3, "still writes")):
            saver.start({"step": step}, objective=None)
            with pytest.raises(SaveError, match=message):
                saver.wait()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(60)
    saver.start({"step": 4}, objective=None)
    saver.wait()
    assert [(outcome.step, outcome.error is None) for outcome in saver.finished()] == [
        (2, False),
        (3, False),
        (1, False),
        (4, True),
    ]
    assert storage.names(uri) == ["step-00000004"]


def test_a_save_is_of_the_moment_it_was_started(tmp_path: Path) -> None:
    engine = engine_of(nn.Linear(2000, 500))
    expected = engine.module.weight.detach().clone()
    saver = Saver(str(tmp_path), engine, facts={}, keep_last=2, keep_every_steps=None, limit_s=60)
    saver.start({"step": 1}, objective=None)
    assert any(thread.name == "checkpoint" for thread in threading.enumerate())
    for fragment in zero_state.fragments(engine):
        for tensor in fragment.tensors.values():
            tensor.zero_()
    saver.wait()
    newest = checkpoint.latest(str(tmp_path))
    assert newest
    assert torch.equal(full_state_dict(newest)["weight"], expected)
    assert torch.equal(full_state_dict(newest, "fp32")["weight"], expected)


def test_exports_load_without_deepspeed_and_ray(config: TrainConfig, tmp_path: Path) -> None:
    expected = old_run(config, str(tmp_path / "old"))
    program = f"""
import sys
sys.modules |= {{"deepspeed": None, "ray": None}}  # importing them raises
import torch
from unclip.pipelines.bundle import Bundle, save_stage
from unclip.pipelines.stages import stage_config_from_dict
from unclip.training import checkpoint
from unclip.training.export import full_state_dict
tensors = full_state_dict(checkpoint.latest({str(tmp_path / "old" / "checkpoints")!r}))
stage = stage_config_from_dict({config.objective.stage_config().to_dict()!r})
save_stage({str(tmp_path / "bundle")!r}, stage, tensors=tensors, clip=None, provenance={{}})
model = Bundle.load({str(tmp_path / "bundle")!r}).load_model("upsampler_256")
assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)
    model = Bundle.load(str(tmp_path / "bundle")).load_model("upsampler_256")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
