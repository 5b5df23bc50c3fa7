"""The manipulations as jobs: what they leave behind, and what they refuse before any weights are read."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unclip.data.embedding import EmbeddingStatistics
from unclip.data.pca import PrincipalComponents
from unclip.data.transforms import area_downscale
from unclip.generation.manipulations import VariationsConfig
from unclip.generation.outputs import read_png, read_png_metadata
from unclip.generation.pictures import Originals
from unclip.pipelines.bundle import Bundle, ClipReference, save_stage
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.manipulations.variations import variations
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import StageConfig, stage_config_from_dict
from unclip.utils import storage

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


def bundle_with(tiny_bundle: str, uri: Path, changes: Mapping[str, Any]) -> str:
    """A decoder that is told something else than z_i."""
    decoder = Bundle.load(tiny_bundle).configs["decoder"].merged(changes)
    save_stage(str(uri), decoder, tensors=decoder.build().state_dict(), clip=None, provenance={})
    return str(uri)


@pytest.fixture
def glide_bundle(tiny_bundle: str, tmp_path: Path) -> str:
    """A decoder that is told captions alone."""
    return bundle_with(tiny_bundle, tmp_path / "glide", {"model": {"embed_dim": None}})


@pytest.fixture
def adm_bundle(tiny_bundle: str, tmp_path: Path) -> str:
    """A decoder that is told classes alone."""
    model = {"embed_dim": None, "text": None, "num_classes": 3}
    changes = {"model": model, "label_column": "kind", "classes": ["cat", "dog", "owl"]}
    return bundle_with(tiny_bundle, tmp_path / "adm", changes)


@pytest.fixture
def autoregressive(tiny_bundle: str, tmp_path: Path) -> str:
    """The tiny bundle with a prior that predicts four components."""
    uri = shutil.copytree(tiny_bundle, tmp_path / "autoregressive")
    shape = {"embed_dim": 8, "context_length": 16, "width": 16, "depth": 1, "heads": 2}
    model = {**shape, "num_components": 4, "num_buckets": 16}
    prior: StageConfig = stage_config_from_dict({"kind": "prior", "prior_type": "autoregressive", "model": model})
    clip = Bundle.load(tiny_bundle).clip
    assert isinstance(clip, ClipReference)
    save_stage(str(uri), prior, tensors=prior.build().state_dict(), clip=clip, provenance={})
    return str(uri)


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
    assert (metadata["row"], metadata["column"]) == ("1.png", "eta 1, seed 5")
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
    found = made(tmp_path)["32/000-001.png"]
    np.testing.assert_array_equal(found[8:24, :16], read_png(pictures[0])[:16, :16])


def test_the_sheet_of_variations_inverts_once(tiny_bundle: str, pictures: list[str]) -> None:
    """Three steps upwards, three back, and three with noise: one call of the decoder each."""
    pipeline, calls = Pipeline.from_bundle(tiny_bundle, with_prior=False), [0]
    pipeline.decoder.network.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    options = {"up_to": 16, "decoder": {"num_inference_steps": 3}}
    given = Originals(np.stack([read_png(uri) for uri in pictures]), ["a", "b"])
    VariationsConfig.from_dict({"count": 2, "options": options}).sheet(pipeline, given)
    assert calls == [9]


def test_an_edit_reads_each_file_once(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pictures: list[str]
) -> None:
    read, real = list[str](), storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: read.append(uri) or real(uri))
    mask = str(tmp_path / "mask.png")
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(mask)
    assert run("edit", f"picture={pictures[0]}", f"keep={mask}", "prompt=a cat", arguments=("--dry-run",)) == 0
    assert [uri for uri in read if uri in (pictures[0], mask)] == [pictures[0], mask]


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


def test_an_autoregressive_prior_is_asked_for_its_components(
    autoregressive: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"bundle={autoregressive}", f"out={tmp_path / 'out'}", listed(pictures), *FAST, "counts=[2,4]"]
    assert job("probe").main([text for change in settings for text in ("--set", change)]) == 0
    metadata = read_png_metadata(str(tmp_path / "out" / "16" / "001-002.png"))
    assert (metadata["row"], metadata["column"]) == ("1.png: components of the autoregressive prior", "4 of 4")
    settings += [f"out={tmp_path / 'other'}", "counts=[5]"]
    (Path(autoregressive) / "prior" / "model.safetensors").write_bytes(b"")
    assert job("probe").main([text for change in settings for text in ("--set", change)]) == 2
    assert "model.safetensors" in capsys.readouterr().err


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
        ("variations", ["pictures=[/none.png]", "options.decoder.sampler=ddpm"], "only ddim comes back"),
        (
            "variations",
            ["pictures=[/none.png]", "options.decoder.eta=0.5"],
            "options.decoder.eta = 0.5: the noise of a",
        ),
        (
            "probe",
            ["pictures=[/none.png]", "options.decoder.eta=1"],
            "options.decoder.eta = 1: the noise of a step is 0",
        ),
        ("interpolate", ["pictures=[/none.png]", "options.decoder.timestep_spacing=fast27"], "options.decoder: "),
        ("probe", ["pictures=[/none.png]"], "components: required, as the bundle has no autoregressive prior"),
        ("text_diff", ["pictures=[/none.png]"], "target: a caption is empty"),
        ("text_diff", ["pictures=[/none.png]", f"target={'a cat ' * 9}"], "target = 'a cat a cat"),
        ("text_diff", ["pictures=[/none.png]", "target=a", f"source={'a cat ' * 9}"], "20 tokens with start and end"),
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


@pytest.mark.parametrize("name", ["variations", "interpolate", "text_diff", "probe", "ablate_prior"])
def test_decoders_that_are_told_no_z_i_are_refused_before_weights_are_read(
    glide_bundle: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(Bundle, "load_model", None)
    settings = [f"bundle={glide_bundle}", f"out={tmp_path / 'out'}"]
    assert job(name).main([text for change in settings for text in ("--set", change)]) == 2
    assert "the decoder is told tokens: no image embedding" in capsys.readouterr().err


def test_counts_of_an_autoregressive_prior_are_checked_without_its_weights(
    autoregressive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "load_model", None)
    settings = [f"bundle={autoregressive}", f"out={tmp_path / 'out'}", "counts=[5]"]
    assert job("probe").main([text for change in settings for text in ("--set", change)]) == 2
    assert "counts = 5: there are 4 components" in capsys.readouterr().err


def test_what_is_finished_is_not_made_again(
    run: Callable[..., int], tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("variations", listed(pictures), "count=1") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    sheet = tmp_path / "out" / "sheet.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bundle, "load_model", None)
        assert run("variations", listed(pictures), "count=1", "options.max_pixels=256") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(sheet)
    assert "finished before" in err
    sheet.unlink()  # as a job leaves it that was killed before the end
    assert run("variations", listed(pictures), "count=1") == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")} == before


@pytest.mark.parametrize("killed", [False, True], ids=["finished", "killed"])
def test_pictures_of_something_else_are_not_replaced(
    run: Callable[..., int], tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str], killed: bool
) -> None:
    assert run("variations", listed(pictures), "count=1", "seed=3") == 0
    if killed:
        (tmp_path / "out" / "sheet.png").unlink()
    assert run("variations", listed(pictures), "count=2") == 2
    assert "its pictures were made otherwise (count, seed); choose another out" in capsys.readouterr().err
    assert run("variations", listed(pictures), "count=1", "seed=3", "options.decoder.guidance_scale=3") == 2
    assert "its pictures were made otherwise (sampling)" in capsys.readouterr().err
    Image.fromarray(255 - read_png(pictures[0])).save(pictures[0])
    assert run("variations", listed(pictures), "count=1", "seed=3") == 2
    assert "its pictures were made otherwise (pictures)" in capsys.readouterr().err
    assert run("ablate_prior", "prompts=[a red heart]") == 2
    assert "its pictures were made otherwise (" in capsys.readouterr().err


def test_foreign_sheets_are_not_replaced(
    run: Callable[..., int], tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sheet.png").write_text("a shopping list")
    assert run("variations", listed(pictures)) == 2
    assert "sheet.png' is no picture of this job" in capsys.readouterr().err


def test_sheets_say_whose_the_training_data_are(
    run: Callable[..., int], tiny_bundle: str, tmp_path: Path, pictures: list[str]
) -> None:
    assert run("ablate_prior", "prompts=[a red heart]") == 0
    plain = read_png(str(tmp_path / "out" / "sheet.png"))
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = bundle / "decoder" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["provenance"]["attributions"] = ["Drawings by A, CC BY-SA 4.0"]
    manifest.write_text(json.dumps(data))
    assert run("ablate_prior", "prompts=[a red heart]", f"bundle={bundle}", f"out={tmp_path / 'said'}") == 0
    said = read_png(str(tmp_path / "said" / "sheet.png"))
    assert len(said) > len(plain)
    np.testing.assert_array_equal(said[: len(plain) - 40], plain[:-40])
    assert (said[len(plain) - 40 :] < 200).any()


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
    assert caption == "a red heart: components of 64 draws of the prior"
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    (tmp_path / "out" / "variations" / "sheet.png").unlink()
    assert job("figures").main([tiny_bundle, *map(str, flags)]) == 0
    assert dict(line.split(": ", 1) for line in capsys.readouterr().out.strip().splitlines()) == lines
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")} == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bundle, "load_model", None)
        assert job("figures").main([tiny_bundle, *map(str, flags)]) == 0
        assert job("figures").main([tiny_bundle, *map(str, flags), "--seed", "5"]) == 2
    assert "its pictures were made otherwise (seed)" in capsys.readouterr().err


def test_figures_of_classes_show_the_first_ones(
    adm_bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[Any] = ["--out", tmp_path / "out", "--up-to", 16, "--count", 2, "--device", "cpu"]
    assert job("figures").main([adm_bundle, *map(str, flags)]) == 0
    assert "left out: the decoder is told label" in capsys.readouterr().out
    samples = tmp_path / "out" / "samples" / "16"
    assert [read_png_metadata(str(samples / f"00{row}-000.png"))["row"] for row in range(3)] == ["cat", "dog", "owl"]
    flags[1] = tmp_path / "other"
    assert job("figures").main([adm_bundle, *map(str, flags), "--prompts", "cat", "dgo"]) == 2
    assert "prompts = 'dgo': none of the 3 classes; did you mean 'dog'?" in capsys.readouterr().err


def test_an_edit_of_a_class_is_told_one(
    adm_bundle: str, tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"bundle={adm_bundle}", f"out={tmp_path / 'out'}", f"picture={pictures[0]}", "canvas=0.5", "count=1"]
    for prompt, status in (("dgo", 2), ("dog", 0)):
        settings = [*changes, "device=cpu", f"prompt={prompt}"]
        assert job("edit").main([text for change in settings for text in ("--set", change)]) == status
    assert "prompt = 'dgo': none of the 3 classes" in capsys.readouterr().err


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
    assert all(line.endswith("left out: the decoder is told tokens: no image embedding") for line in others)
