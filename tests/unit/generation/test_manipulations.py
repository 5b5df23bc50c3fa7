"""The manipulations as jobs: what they leave behind, and what they refuse before any weights are read."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unclip.data.embedding import EmbeddingStatistics
from unclip.data.pca import PrincipalComponents
from unclip.data.transforms import area_downscale
from unclip.generation.outputs import read_png, read_png_metadata
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.manipulations.variations import variations
from unclip.pipelines.pipeline import Pipeline

JOBS = Path(__file__).parents[3] / "jobs"
FAST = ["options.up_to=32", "options.decoder.num_inference_steps=3", "device=cpu"]


def job(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    values = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for index, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return [str(tmp_path / f"{index}.png") for index in range(2)]


@pytest.fixture
def run(tiny_bundle: str, tmp_path: Path) -> Callable[..., int]:
    def call(name: str, *changes: str, arguments: tuple[str, ...] = ()) -> int:
        settings = [f"bundle={tiny_bundle}", f"out={tmp_path / 'out'}", *FAST, *changes]
        return int(job(name).main([*arguments, *(text for change in settings for text in ("--set", change))]))

    return call


def made(tmp_path: Path) -> dict[str, np.ndarray]:
    out = tmp_path / "out"
    return {str(path.relative_to(out)): read_png(str(path)) for path in sorted(out.glob("*/*.png"))}


def listed(pictures: list[str]) -> str:
    return f"pictures=[{','.join(pictures)}]"


def test_variations_leave_every_size_and_say_what_they_are(
    run: Callable[..., int], tmp_path: Path, pictures: list[str], tiny_bundle: str
) -> None:
    assert run("variations", listed(pictures), "count=2", "seed=4") == 0
    found = made(tmp_path)
    names = [f"{row:03d}-{column:03d}.png" for row in (0, 1) for column in (1, 2, 3)]
    assert list(found) == [f"{size}/{name}" for size in (16, 32) for name in names]
    options = GenerationOptions().merged({"up_to": 32, "decoder": {"num_inference_steps": 3}})
    given = np.stack([read_png(uri) for uri in pictures])
    expected = variations(Pipeline.from_bundle(tiny_bundle), given, [4, 5], options=options)
    for row in (0, 1):
        for column in (2, 3):
            name = f"32/{row:03d}-{column:03d}.png"
            difference = np.abs(found[name].astype(int) - expected.images[32][2 * row + column - 2].astype(int))
            assert difference.max() <= 2
    metadata = read_png_metadata(str(tmp_path / "out" / "32" / "001-003.png"))
    assert metadata["column"] == "seed 5"
    assert metadata["bundle"] == Bundle.load(tiny_bundle).digest
    assert json.loads(metadata["settings"])["seed"] == 4
    assert (tmp_path / "out" / "sheet.png").exists()


@pytest.mark.parametrize(
    ("name", "changes", "rows", "columns"),
    [
        ("interpolate", ["frames=3"], 2, range(1, 4)),
        ("text_diff", ["frames=3", "target=a red heart"], 2, range(1, 4)),
        ("text_diff", ["frames=3", "target=a red heart", "source=null"], 2, range(1, 4)),
    ],
)
def test_ways_are_rows_of_frames(
    run: Callable[..., int],
    tmp_path: Path,
    pictures: list[str],
    name: str,
    changes: list[str],
    rows: int,
    columns: range,
) -> None:
    assert run(name, listed(pictures), *changes) == 0
    names = [f"{row:03d}-{column:03d}.png" for row in range(rows) for column in columns]
    assert list(made(tmp_path)) == [f"{size}/{name}" for size in (16, 32) for name in names]


def test_an_edit_keeps_what_the_mask_keeps(run: Callable[..., int], tmp_path: Path, pictures: list[str]) -> None:
    mask = np.zeros((32, 32, 3), dtype=np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = [f"picture={pictures[0]}", "prompt=a red heart", f"repaint={tmp_path / 'mask.png'}", "count=2"]
    assert run("edit", *arguments) == 0
    original = read_png(pictures[0])
    for name, picture in made(tmp_path).items():
        size = len(picture)
        kept = 20 * size // 32
        np.testing.assert_array_equal(picture[:, :kept], area_downscale(original, size)[:, :kept], err_msg=name)
        assert (picture[:, kept:] != area_downscale(original, size)[:, kept:]).any()


def test_a_canvas_holds_the_picture_in_its_place(run: Callable[..., int], tmp_path: Path, pictures: list[str]) -> None:
    Image.fromarray(read_png(pictures[0])[:16, :16]).save(tmp_path / "small.png")
    arguments = [f"picture={tmp_path / 'small.png'}", "prompt=a red heart", "canvas=0.5", "place=left", "count=1"]
    assert run("edit", *arguments) == 0
    found = made(tmp_path)["32/000-002.png"]
    np.testing.assert_array_equal(found[8:24, :16], read_png(pictures[0])[:16, :16])


def test_probing_takes_components_of_its_own_clip(
    run: Callable[..., int], tmp_path: Path, pictures: list[str], tiny_bundle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = EmbeddingStatistics(8)
    seen.update(np.random.default_rng(0).normal(size=(40, 8)))
    reference = Bundle.load(tiny_bundle).clip
    assert reference is not None
    for name, clip in (("ours", reference.fingerprint), ("theirs", "another")):
        PrincipalComponents.fit(seen, clip=clip).save(str(tmp_path / f"{name}.safetensors"))
    assert run("probe", listed(pictures), f"components={tmp_path / 'ours.safetensors'}", "counts=[2,8]") == 0
    assert list(made(tmp_path)) == [
        f"{size}/{row:03d}-{k:03d}.png" for size in (16, 32) for row in (0, 1) for k in (1, 2)
    ]
    refused = {
        f"components={tmp_path / 'theirs.safetensors'}": "of the CLIP another, which is not the bundle's",
        "components=null": "components: required, as the bundle has no autoregressive prior",
    }
    for setting, message in refused.items():
        assert run("probe", listed(pictures), setting) == 2
        assert message in capsys.readouterr().err
    assert run("probe", listed(pictures), f"components={tmp_path / 'ours.safetensors'}", "counts=[9]") == 2
    assert "counts = 9: there are 8 components" in capsys.readouterr().err


def test_the_ablation_has_a_column_for_each_condition(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("ablate_prior", "prompts=[a red heart,a green circle]") == 0
    columns = [read_png_metadata(str(tmp_path / "out" / "16" / f"000-00{k}.png"))["column"] for k in range(3)]
    assert columns == ["caption only", "text embedding", "prior"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("variations", [], "pictures: 0 given; at least 1 needed"),
        ("variations", ["out="], "out: required"),
        ("variations", ["pictures=[/none.png]"], "pictures = '/none.png': does not exist"),
        ("interpolate", ["pictures=[/none.png]"], "pictures: 1 given; at least 2 needed"),
        ("text_diff", ["pictures=[/none.png]"], "target: required"),
        ("edit", ["prompt=a cat"], "picture: required"),
        ("edit", ["picture=/none.png"], "prompt: a caption is empty"),
        ("edit", ["picture=/none.png", f"prompt={'a cat ' * 9}"], "20 tokens with start and end; the networks read 16"),
        ("ablate_prior", [], "prompts: required"),
        ("ablate_prior", ["prompts=[a]", "options.up_to=48"], "options.up_to = 48"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_read(
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: list[str],
    message: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Bundle, "load_model", refuse)
    assert run(name, *changes) == 2
    assert message in capsys.readouterr().err


def test_dry_runs_make_nothing(run: Callable[..., int], tmp_path: Path, pictures: list[str]) -> None:
    assert run("variations", listed(pictures), arguments=("--dry-run",)) == 0
    assert not made(tmp_path)


def test_figures_of_a_bundle(tiny_bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags: list[Any] = ["--out", tmp_path / "out", "--up-to", 16, "--count", 2, "--device", "cpu"]
    flags += ["--prompts", "a red heart", "a green circle"]
    assert job("figures").main([tiny_bundle, *map(str, flags)]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.strip().splitlines())
    names = ["samples", "variations", "interpolations", "text_diffs", "probing", "prior_ablation"]
    assert list(lines) == names
    assert all(Path(lines[name]).read_bytes() for name in names)
    caption = read_png_metadata(str(tmp_path / "out" / "probing" / "16" / "000-001.png"))["row"]
    assert caption == "components of 64 draws of the prior"


def test_figures_that_a_bundle_cannot_make_are_left_out_with_a_line(
    glide_bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[Any] = ["--out", tmp_path / "out", "--up-to", 16, "--count", 2, "--device", "cpu"]
    assert job("figures").main([glide_bundle, *map(str, flags)]) == 0
    first, *others = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("samples: ")
    assert [line.split(": ")[0] for line in others] == [
        "variations",
        "interpolations",
        "text_diffs",
        "probing",
        "prior_ablation",
    ]
    assert all(line.endswith("left out: the decoder is told no image embedding") for line in others)


@pytest.fixture
def glide_bundle(tiny_bundle: str, tmp_path: Path) -> str:
    """A decoder that is told captions alone."""
    from unclip.pipelines.bundle import save_stage

    decoder = Bundle.load(tiny_bundle).configs["decoder"].merged({"model": {"embed_dim": None}})
    uri = str(tmp_path / "glide")
    save_stage(uri, decoder, tensors=decoder.build().state_dict(), clip=None, provenance={})
    return uri
