from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unclip.config.base import ConfigError
from unclip.generation.outputs import read_png_metadata
from unclip.generation.requests import GenerateConfig
from unclip.generation.run import GenerationJob
from unclip.pipelines.bundle import Bundle, BundleError

JOB = Path(__file__).parents[3] / "jobs" / "generate.py"


@pytest.fixture
def config(tiny_bundle: str, tmp_path: Path) -> Callable[..., GenerateConfig]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue heart\n")

    def build(**changes: Any) -> GenerateConfig:
        fields = {"bundle": tiny_bundle, "prompts_file": str(prompts), "out": str(tmp_path / "out"), "device": "cpu"}
        return GenerateConfig.from_dict({**fields, "options": {"up_to": 32}, **changes})

    return build


def pictures(tmp_path: Path) -> dict[str, bytes]:
    out = tmp_path / "out"
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


def test_makes_every_size_of_every_prompt_and_a_grid(config: Callable[..., GenerateConfig], tmp_path: Path) -> None:
    settings = config(images_per_prompt=2, seed=7, batch_size=3)
    grid = GenerationJob.prepare(settings).run()
    assert grid == str(tmp_path / "out" / "grid.png")
    names = [f"{index:05d}-{seed}.png" for index in (0, 1) for seed in (7, 8)]
    assert list(pictures(tmp_path)) == sorted([*(f"{size}/{name}" for size in (16, 32) for name in names), "grid.png"])
    with Image.open(tmp_path / "out" / "32" / names[3]) as image:
        assert image.size == (32, 32)
    metadata = read_png_metadata(str(tmp_path / "out" / "32" / names[3]))
    assert (metadata["prompt"], metadata["seed"]) == ("a blue heart", "8")
    assert metadata["bundle"] == Bundle.load(settings.bundle).digest


def test_running_again_makes_only_what_is_missing(config: Callable[..., GenerateConfig], tmp_path: Path) -> None:
    GenerationJob.prepare(config()).run()
    before = pictures(tmp_path)
    kept, lost = tmp_path / "out" / "32" / "00000-0.png", tmp_path / "out" / "16" / "00001-0.png"
    os.utime(kept, (1, 1))
    lost.unlink()
    GenerationJob.prepare(config(batch_size=1)).run()
    assert pictures(tmp_path) == before
    assert kept.stat().st_mtime == 1


@pytest.mark.parametrize(
    "changes", [{"options": {"up_to": 32, "decoder": {"guidance_scale": 6.0}}}, {"precision": "bf16"}]
)
def test_other_settings_make_new_pictures(
    config: Callable[..., GenerateConfig], tmp_path: Path, changes: dict[str, Any]
) -> None:
    GenerationJob.prepare(config()).run()
    before = pictures(tmp_path)
    GenerationJob.prepare(config(**changes)).run()
    after = pictures(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


def test_a_damaged_picture_is_made_again(config: Callable[..., GenerateConfig], tmp_path: Path) -> None:
    GenerationJob.prepare(config()).run()
    before = pictures(tmp_path)
    (tmp_path / "out" / "16" / "00000-0.png").write_bytes(b"")
    GenerationJob.prepare(config()).run()
    assert pictures(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bundle": "/nowhere"}, BundleError, "'/nowhere' is no bundle"),
        ({"options": {"up_to": 48}}, ConfigError, "up_to = 48"),
        ({"prompts_file": None, "prompt": "dog " * 15}, ConfigError, "17 tokens .*; the networks read 16"),
        ({"device": "cuda:99"}, ConfigError, "device = 'cuda:99'"),
        ({"out": "/dev/null/pictures"}, OSError, "'/dev/null/pictures' cannot be written"),
    ],
)
def test_bad_input_is_found_before_weights_are_read(
    config: Callable[..., GenerateConfig], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        GenerationJob.prepare(config(**changes))


def run_job(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("generate_job", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    return int(module.main())


def test_the_job_prints_the_grids_path_last(
    tiny_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ["--set", f"bundle={tiny_bundle}", "--set", f"out={out}", "--set", "prompt=a red circle"]
    assert run_job(monkeypatch, *common, "--set", "options.up_to=16", "--dry-run") == 0
    assert not list(out.rglob("*.png"))
    assert run_job(monkeypatch, *common, "--set", "options.up_to=16") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "grid.png")
    assert (out / "16" / "00000-0.png").exists()
    assert (out / "grid.png").exists()


def test_the_job_explains_what_is_wrong(
    tiny_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(tiny_bundle, tmp_path / "broken")
    (broken / "prior" / "model.safetensors").write_bytes(b"")
    arguments = ["--set", f"bundle={broken}", "--set", f"out={tmp_path}", "--set", "prompt=a dog"]
    assert run_job(monkeypatch, *arguments) == 2
    assert "prior/model.safetensors' has 0 bytes" in capsys.readouterr().err
