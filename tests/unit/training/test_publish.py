"""A finished run's stage in its bundle, and what the bundle's card says of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jobs import write_card as job

from unclip.pipelines.bundle import Bundle
from unclip.recipes import RECIPES
from unclip.training.in_process import local_batches
from unclip.training.loop import Trainer
from unclip.training.publish import publish
from unclip.training.run_folder import RunFolder
from unclip.training.setup import prepare_run


def test_card_says_what_a_run_did(openmoji: str, tmp_path: Path) -> None:
    data, bundle = f"{openmoji}/64/train", tmp_path / "bundle"
    changes = {"run": str(tmp_path / "run"), "bundle": str(bundle), "data": {"path": data}, "loop": {"max_steps": 2}}
    prepared = prepare_run(RECIPES["upsampler_256"]["debug"]().merged(changes))
    config = prepared.config
    RunFolder(config.run).open(config)
    Trainer(config, rank=0, device=torch.device("cpu")).train(local_batches(prepared))
    publish(prepared)

    facts = json.loads(Path(data, "manifest.json").read_text())
    samples = config.loop.max_steps * config.loop.global_batch_size
    card = (bundle / "README.md").read_text()
    cells = [
        cell.strip().replace("\\", "")
        for cell in next(line for line in card.splitlines() if facts["source"] in line).split("|")
    ]
    assert cells[1:-1] == ["upsampler_256", facts["source"], f"{facts['rows']:,}", f"{samples:,}", facts["licence"]]
    assert facts["attribution"] in card.replace("\\", "")
    assert f"| debug | {config.loop.max_steps} | {samples:,} | trained here |" in card
    assert f'"learning_rate": {config.optimizer.learning_rate}' in card
    assert str(tmp_path) not in card

    digest = Bundle.load(str(bundle)).digest
    publish(prepared)  # the same run makes the same card
    assert (bundle / "README.md").read_text() == card
    assert job.main(["--set", f"bundle={bundle}", "--set", "licence=cc-by-sa-4.0"]) == 0
    assert "\nlicense: cc-by-sa-4.0\n" in (bundle / "README.md").read_text()
    publish(prepared)
    assert "\nlicense: cc-by-sa-4.0\n" in (bundle / "README.md").read_text()  # what was stated stays
    assert Bundle.load(str(bundle)).digest == digest


def test_job_refuses_what_is_no_evaluation(tiny_bundle: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    for argument in (f"evaluation={tmp_path}/result.json", f"evaluation={tmp_path}/none.json"):
        assert job.main(["--set", f"bundle={tiny_bundle}", "--set", argument]) == 2
    assert job.main([]) == 2
    assert not Path(tiny_bundle, "README.md").exists()
