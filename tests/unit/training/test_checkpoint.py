"""Checkpoints of one process; tests/distributed/test_saver.py has several, other ZeRO stages, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from unclip.training import checkpoint, zero_state
from unclip.training.checkpoint import CheckpointError
from unclip.training.engine import Engine, ZeroConfig
from unclip.training.export import export_weights, full_state_dict
from unclip.training.optim import OptimizerConfig
from unclip.training.saver import Saver
from unclip.utils import storage


class Model(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.register_buffer("statistics", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


@dataclass
class Output:
    loss: torch.Tensor


def new_engine(width: int = 5, stage: int = 1) -> Engine:
    config = OptimizerConfig(learning_rate=0.1, ema_decay=0.5)
    device = torch.device("cpu")
    zero = ZeroConfig(stage=stage, precision="fp32")
    return Engine(Model(width), config, zero, microbatch_size=4, accumulation_steps=1, device=device)


def train(engine: Engine) -> Engine:
    output = engine.forward(lambda: Output(engine.module.layer(torch.randn(4, 3)).square().mean()))
    engine.backward(output.loss)
    engine.step(0.1)
    return engine


def save(uri: str, engine: Engine, step: int, objective: dict[str, torch.Tensor] | None = None) -> str:
    saver = Saver(uri, engine, facts={"seed": 5}, keep_last=100, keep_every_steps=None, limit_s=60)
    saver.start({"step": step, "samples_seen": 4 * step}, objective=objective)
    saver.wait()
    return checkpoint.folder(uri, step)


def file_of(folder: str) -> str:
    return next(storage.join(folder, name) for name in storage.names(folder) if name.startswith("rank-"))


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {f"{kind}/{f.name}": t.clone() for f in zero_state.fragments(engine) for kind, t in f.tensors.items()}


@pytest.fixture(params=["local", "object store"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


def test_state_step_and_buffers_come_back(uri: str) -> None:
    engine = train(train(new_engine()))
    engine.module.statistics.copy_(torch.tensor([3.0, 4.0], dtype=torch.float64))
    save(uri, engine, 7)
    found = checkpoint.latest(uri)
    assert found
    assert (found.step, found.state, found.run) == (7, {"step": 7, "samples_seen": 28}, {"seed": 5})

    other = new_engine(stage=0)
    checkpoint.load(found, other)
    assert other.steps == 2
    assert [float(state["step"]) for state in other.optimizer.state.values()] == [2.0, 2.0]
    expected = state_of(engine)
    assert expected.keys() == {f"{k}/layer.{n}" for k in zero_state.KINDS for n in ("weight", "bias")}
    for key, value in state_of(other).items():
        assert torch.equal(value, expected[key]), key
    assert other.module.statistics.tolist() == [3.0, 4.0]


def test_the_objectives_state_comes_back_to_the_bit(uri: str) -> None:
    engine = new_engine()
    state = {"losses": torch.rand(3, 10), "losses_seen": torch.tensor([2**40, 0, 7])}
    save(uri, engine, 1, objective=state)
    found = checkpoint.latest(uri)
    assert found
    assert found.manifest["objective"] == {"losses": [3, 10], "losses_seen": [3]}
    loaded = checkpoint.load(found, new_engine())
    assert loaded.keys() == state.keys()
    assert all(loaded[name].dtype == value.dtype and torch.equal(loaded[name], value) for name, value in state.items())
    save(uri, engine, 2)
    without = checkpoint.latest(uri)
    assert without
    assert checkpoint.load(without, engine) == {}


def test_a_state_from_before_the_first_step_is_one_too(uri: str) -> None:
    engine = new_engine()
    save(uri, engine, 0)
    weights = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    for name, tensor in export_weights(checkpoint.committed(uri)[0], "ema"):
        assert torch.equal(tensor, weights[name])


def test_export_gives_weights_or_average_in_their_shapes(uri: str) -> None:
    engine = train(train(new_engine()))
    save(uri, engine, 2)
    found = checkpoint.committed(uri)[0]
    trained, averaged = full_state_dict(found, "fp32"), full_state_dict(found)
    assert trained.keys() == engine.module.state_dict().keys() == averaged.keys()
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(trained[name], parameter)
        assert not torch.equal(averaged[name], parameter)
        assert averaged[name].dtype == torch.float32
    Model().load_state_dict(averaged)


def test_slices_of_a_parameter_are_read_alone(tmp_path: Path) -> None:
    engine = new_engine()
    save(str(tmp_path), engine, 1)
    flat = engine.module.layer.weight.detach().flatten()
    with checkpoint.FragmentReader(checkpoint.committed(str(tmp_path))[0]) as reader:
        assert torch.equal(reader.read("layer.weight", "fp32", 4, 7), flat[4:11])
        with pytest.raises(CheckpointError, match=r"1 of the 3 elements .* 'layer.weight'"):
            reader.read("layer.weight", "fp32", 14, 3)


def test_incomplete_checkpoints_do_not_count(uri: str) -> None:
    engine = new_engine()
    folders = {step: save(uri, engine, step) for step in (1, 2, 3, 10)}
    storage.remove(storage.join(folders[3], "manifest.json"))
    file = file_of(folders[10])
    storage.write_bytes(file, storage.read_bytes(file)[:-1])
    storage.remove(file_of(folders[2]))
    storage.write_bytes(storage.join(uri, "notes", "manifest.json"), b"{}")
    assert [found.step for found in checkpoint.committed(uri)] == [1]
    assert checkpoint.committed(storage.join(uri, "nowhere")) == []
    assert checkpoint.latest(storage.join(uri, "nowhere")) is None


def test_damage_is_noticed_and_says_what_to_do(uri: str) -> None:
    engine = new_engine()
    folder = save(uri, engine, 1)
    file = file_of(folder)
    content = bytearray(storage.read_bytes(file))
    content[-1] ^= 1
    storage.write_bytes(file, bytes(content))
    with pytest.raises(CheckpointError, match=rf"{file} is damaged.*delete the folder {folder} "):
        checkpoint.load(checkpoint.committed(uri)[0], engine)
    storage.write_bytes(storage.join(folder, "manifest.json"), b"{")
    with pytest.raises(CheckpointError, match=rf"{folder}/manifest.json is damaged.*delete the folder {folder} "):
        checkpoint.latest(uri)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(str(tmp_path), new_engine(width=4), 1)
    engine = new_engine()
    before = state_of(engine)
    with pytest.raises(CheckpointError, match=r"layer.weight: stored \(4, 3\), model \(5, 3\)"):
        checkpoint.load(checkpoint.committed(str(tmp_path))[0], engine)
    assert all(torch.equal(value, before[key]) for key, value in state_of(engine).items())


def test_collect_keeps_the_newest_complete_ones(uri: str) -> None:
    engine = new_engine()
    for step in (1, 2, 30, 100, 200):
        save(uri, engine, step)
    storage.remove(storage.join(checkpoint.folder(uri, 200), "manifest.json"))
    storage.write_bytes(storage.join(uri, "notes.txt"), b"mine")
    storage.write_bytes(storage.join(uri, "step-00000100", "rank-00000-of-00003-dead.safetensors"), b"leftover")
    checkpoint.collect(uri, keep_last=2)
    assert storage.names(uri) == ["notes.txt", "step-00000030", "step-00000100"]
    assert len(storage.names(storage.join(uri, "step-00000100"))) == 2
    with pytest.raises(ValueError, match="keep_last must be at least 1, not 0"):
        checkpoint.collect(uri, keep_last=0)


def test_collect_keeps_some_for_good(uri: str) -> None:
    engine = new_engine()
    for step in (3, 4, 6, 8, 9, 10):
        save(uri, engine, step)
    storage.remove(storage.join(checkpoint.folder(uri, 6), "manifest.json"))
    checkpoint.collect(uri, keep_last=1, keep_every_steps=3)
    assert [found.step for found in checkpoint.committed(uri)] == [3, 9, 10]
    assert len(storage.names(uri)) == 3


def test_files_are_what_others_read_too_and_hold_no_pickles(tmp_path: Path) -> None:
    engine = train(new_engine())
    engine.module.statistics.fill_(3.0)
    folder = Path(save(str(tmp_path), engine, 1, objective={"seen": torch.tensor([1, 2]), "none": torch.zeros(0, 3)}))
    file, manifest = sorted(folder.iterdir(), reverse=True)
    assert (file.suffix, manifest.name) == (".safetensors", "manifest.json")
    entry = json.loads(manifest.read_text())["files"][0]
    assert (entry["name"], entry["bytes"]) == (file.name, file.stat().st_size)
    assert entry["sha256"] == [hashlib.sha256(file.read_bytes()).hexdigest()]
    tensors = load_file(file)
    assert tensors["buffer/statistics"].tolist() == [3.0, 3.0]
    assert tensors["objective/seen"].tolist() == [1, 2]
    assert tensors["objective/none"].shape == (0, 3)
    for key, value in state_of(engine).items():
        assert torch.equal(tensors[key], value)


def test_the_loop_must_say_its_step(tmp_path: Path) -> None:
    saver = Saver(str(tmp_path), new_engine(), facts={}, keep_last=1, keep_every_steps=None, limit_s=60)
    with pytest.raises(ValueError, match="'step'"):
        saver.start({"samples_seen": 3}, objective=None)


def test_frozen_parameters_are_refused() -> None:
    model = Model()
    model.layer.bias.requires_grad_(False)
    config = OptimizerConfig(learning_rate=0.1)
    with pytest.raises(ValueError, match=r"frozen: layer\.bias"):
        Engine(model, config, ZeroConfig(), microbatch_size=1, accumulation_steps=1, device=torch.device("cpu"))


def test_a_step_needs_all_its_micro_batches() -> None:
    config = OptimizerConfig(learning_rate=0.1)
    engine = Engine(Model(), config, ZeroConfig(), microbatch_size=1, accumulation_steps=2, device=torch.device("cpu"))
    output = engine.forward(lambda: Output(engine.module.layer(torch.randn(1, 3)).square().mean()))
    assert not engine.is_accumulation_boundary
    with pytest.raises(RuntimeError, match="micro-batches"):
        engine.step(0.1)
    engine.backward(output.loss)
    assert engine.is_accumulation_boundary


@pytest.fixture(autouse=True)
def _empty_object_store() -> None:
    fsspec.filesystem("memory").store.clear()
