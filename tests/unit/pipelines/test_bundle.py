from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.pipelines.bundle import Bundle, BundleError, ClipReference, save_stage
from unclip.pipelines.stages import STAGE_NAMES, StageConfig
from unclip.utils import storage
from unclip.utils.hashing import sha256_file

OTHER_CLIP = ClipReference(source="ViT-B-32/openai", fingerprint="f" * 64)


@pytest.fixture
def bundle(tiny_bundle: str, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(bundle: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes a stage's tensors and makes its manifest agree, so that only the tensors themselves are wrong."""
    weights = bundle / name / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    stored = {"bytes": weights.stat().st_size, "sha256": sha256_file(weights)}
    edit_json(bundle / name / "manifest.json", lambda manifest: manifest.update(weights=stored))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip_is_exact(
    tiny_bundle: str, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    bundle = Bundle.load(tiny_bundle)
    assert tuple(bundle.configs) == tuple(name for name in STAGE_NAMES if name in tiny_configs)
    assert dict(bundle.configs) == dict(tiny_configs)
    for name in bundle.configs:
        loaded, expected = bundle.load_model(name).state_dict(), tiny_models[name].state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert bundle.manifests["prior"].provenance == {"step": 7}
    assert bundle.load_clip().fingerprint == tiny_models["clip"].fingerprint


def test_loaded_networks_are_frozen(tiny_bundle: str) -> None:
    model = Bundle.load(tiny_bundle).load_model("decoder")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_works_on_an_object_store(
    tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    uri = "memory://bundles/one"
    model = tiny_models["upsampler_256"]
    save_stage(uri, tiny_configs["upsampler_256"], tensors=model.state_dict().items(), clip=None, provenance={})
    bundle = Bundle.load(uri)
    assert list(bundle.configs) == ["upsampler_256"]
    loaded = bundle.load_model("upsampler_256").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    with pytest.raises(BundleError, match=r"names no CLIP"):
        bundle.load_clip()
    storage.remove(uri)


def test_attributions_of_all_stages_are_said_once(tiny_bundle: str, bundle: Path) -> None:
    assert Bundle.load(tiny_bundle).attribution == ""
    said = {
        "decoder": ["By A, CC BY", "By B"],
        "clip": ["By A, CC BY"],
        "upsampler_256": "no list",
        "prior": ["C" * 900],
    }
    for name, texts in said.items():
        edit_json(bundle / name / "manifest.json", lambda data: data["provenance"].update(attributions=texts))  # noqa: B023
    found = Bundle.load(str(bundle)).attribution
    assert found == f"By A, CC BY {'C' * 900} By B"[:400]


def test_digest_follows_the_weights(
    bundle: Path, tiny_bundle: str, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    before = Bundle.load(tiny_bundle).digest
    assert Bundle.load(str(bundle)).digest == before
    changed = {key: value + 1 for key, value in tiny_models["upsampler_256"].state_dict().items()}
    save_stage(str(bundle), tiny_configs["upsampler_256"], tensors=changed, clip=None, provenance={})
    assert Bundle.load(str(bundle)).digest != before


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle: none of clip, .* has a manifest.json"):
        Bundle.load(str(tmp_path))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match=r"clip/manifest.json' is not valid JSON"):
        Bundle.load(str(tmp_path))


def test_another_schema_version_is_refused(bundle: Path) -> None:
    edit_json(bundle / "prior" / "manifest.json", lambda manifest: manifest.update(schema_version=1))
    with pytest.raises(BundleError, match=r"prior/manifest.json.*schema_version = 1; this version of unclip reads 2"):
        Bundle.load(str(bundle))


def test_unknown_keys_are_refused(bundle: Path, tmp_path: Path) -> None:
    edit_json(bundle / "prior" / "config.json", lambda config: config.update(num_drawz=3))
    with pytest.raises(BundleError, match=r"prior/config.json.*num_drawz: unknown field; did you mean 'num_draws'"):
        Bundle.load(str(bundle))
    edit_json(bundle / "prior" / "manifest.json", lambda manifest: manifest.update(extra=1))
    with pytest.raises(BundleError, match=r"manifest.json.*extra: unknown field"):
        Bundle.load(str(bundle))


def test_an_edited_config_is_refused(bundle: Path) -> None:
    edit_json(bundle / "prior" / "config.json", lambda config: config.update(num_draws=3))
    with pytest.raises(BundleError, match=r"prior/config.json' is not the file that was exported"):
        Bundle.load(str(bundle))


def test_a_config_in_another_stages_folder_is_refused(bundle: Path) -> None:
    shutil.copy(bundle / "upsampler_256" / "config.json", bundle / "upsampler_1024" / "config.json")
    with pytest.raises(BundleError, match=r"kind = 'upsampler_256', but the folder is that of stage 'upsampler_1024'"):
        Bundle.load(str(bundle))


def test_truncated_and_missing_files_are_found_before_weights_are_read(bundle: Path) -> None:
    weights = bundle / "decoder" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"has {len(content) - 1} bytes instead of {len(content)}"):
        Bundle.load(str(bundle))
    weights.unlink()
    with pytest.raises(BundleError, match=r"decoder/model.safetensors' is missing"):
        Bundle.load(str(bundle))
    (bundle / "decoder" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"decoder/config.json' is missing"):
        Bundle.load(str(bundle))


def test_a_flipped_bit_is_found(bundle: Path) -> None:
    weights = bundle / "decoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder/model.safetensors' is damaged"):
        Bundle.load(str(bundle)).load_model("decoder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("query"), "query is missing"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "more is unknown"),
        (lambda tensors: tensors.update(query=torch.zeros(3)), r"query has shape \(3,\) instead of \(16,\)"),
    ],
)
def test_weights_must_fit_exactly(
    bundle: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_weights(bundle, "prior", change)
    with pytest.raises(BundleError, match=message):
        Bundle.load(str(bundle)).load_model("prior")


def edit_config(bundle: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a stage's configuration and makes its manifest agree, as whoever made the bundle could."""
    config = bundle / name / "config.json"
    edit_json(config, change)
    stored = {"bytes": config.stat().st_size, "sha256": sha256_file(config)}
    edit_json(bundle / name / "manifest.json", lambda manifest: manifest.update(config=stored))


def test_a_network_larger_than_its_weights_is_not_allocated(bundle: Path) -> None:
    """2^24 wide, one projection alone would take a petabyte."""
    edit_config(bundle, "prior", lambda config: config["model"].update(width=2**24))
    with pytest.raises(BundleError, match=r"the weights do not fit the configuration: .* instead of .*16777216"):
        Bundle.load(str(bundle)).load_model("prior")


@pytest.mark.parametrize("width", [2**40, 2**64], ids=["bytes", "argument"])
def test_sizes_that_no_tensor_can_have_are_refused(bundle: Path, width: int) -> None:
    edit_config(bundle, "prior", lambda config: config["model"].update(width=width))
    with pytest.raises(BundleError, match=r"prior.*: the configuration makes no network: "):
        Bundle.load(str(bundle)).load_model("prior")


@pytest.mark.parametrize(
    ("field", "bound"), [("model.depth", 512), ("diffusion.num_train_timesteps", 100_000)], ids=["depth", "timesteps"]
)
def test_what_weights_do_not_bound_is_bounded_by_its_range(bundle: Path, field: str, bound: int) -> None:
    section, name = field.split(".")
    edit_config(bundle, "prior", lambda config: config[section].update({name: 10**9}))
    with pytest.raises(BundleError, match=rf"{field} = 1000000000: .*less than or equal to {bound}"):
        Bundle.load(str(bundle))


def test_a_missing_stage_is_named(bundle: Path) -> None:
    (bundle / "decoder" / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"no stage 'decoder'; it has clip, prior, upsampler_256"):
        Bundle.load(str(bundle)).load_model("decoder")


def test_a_stage_of_another_clip_is_not_added(
    bundle: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    before, ours = contents(bundle), str(tiny_models["clip"].fingerprint)
    for name in ("prior", "clip"):
        tensors = tiny_models[name].state_dict()
        with pytest.raises(BundleError, match=f"{OTHER_CLIP.fingerprint}.*{ours}"):
            save_stage(str(bundle), tiny_configs[name], tensors=tensors, clip=OTHER_CLIP, provenance={})
    assert contents(bundle) == before


def test_the_only_stage_with_a_clip_may_be_replaced(
    tmp_path: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    uri, tensors = str(tmp_path / "bundle"), tiny_models["prior"].state_dict()
    for clip in (ClipReference(source="a", fingerprint="a"), OTHER_CLIP):
        save_stage(uri, tiny_configs["prior"], tensors=tensors, clip=clip, provenance={})
    assert Bundle.load(uri).clip == OTHER_CLIP
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == ["prior"]


def test_a_stage_of_another_clip_is_not_loaded(bundle: Path) -> None:
    edit_json(bundle / "prior" / "manifest.json", lambda manifest: manifest["clip"].update(fingerprint="e" * 64))
    with pytest.raises(BundleError, match=f"stage 'clip' belongs .* but stage 'prior' there to {'e' * 64}"):
        Bundle.load(str(bundle))


def test_an_external_clip_must_have_the_stored_fingerprint(
    bundle: Path,
    tiny_bundle: str,
    tmp_path: Path,
    tiny_configs: Mapping[str, StageConfig],
    tiny_models: Mapping[str, Any],
) -> None:
    source, fingerprint = str(Path(tiny_bundle) / "clip"), tiny_models["clip"].fingerprint
    prior, tensors = tiny_configs["prior"], tiny_models["prior"].state_dict()
    right, wrong = str(tmp_path / "right"), str(tmp_path / "wrong")
    save_stage(right, prior, tensors=tensors, clip=ClipReference(source=source, fingerprint=fingerprint), provenance={})
    assert Bundle.load(right).load_clip().fingerprint == fingerprint
    save_stage(wrong, prior, tensors=tensors, clip=ClipReference(source=source, fingerprint="0"), provenance={})
    with pytest.raises(BundleError, match=f"trained with the CLIP of fingerprint 0, .*{fingerprint}"):
        Bundle.load(wrong).load_clip()


def test_tensors_that_do_not_fit_change_nothing(
    bundle: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    before = contents(bundle)
    tensors = dict(list(tiny_models["upsampler_256"].state_dict().items())[1:])
    with pytest.raises(BundleError, match=r"upsampler_256': the weights do not fit the configuration: .* is missing"):
        save_stage(str(bundle), tiny_configs["upsampler_256"], tensors=tensors, clip=None, provenance={})
    assert contents(bundle) == before


def test_stages_in_a_clips_space_come_with_it_and_no_others(
    tmp_path: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    for name, clip in (("prior", None), ("decoder", None), ("upsampler_256", OTHER_CLIP)):
        with pytest.raises(BundleError, match=rf"stage '{name}': clip = "):
            save_stage(
                str(tmp_path), tiny_configs[name], tensors=tiny_models[name].state_dict(), clip=clip, provenance={}
            )


def test_a_decoder_of_captions_alone_needs_no_clip(tmp_path: Path, tiny_configs: Mapping[str, StageConfig]) -> None:
    glide = tiny_configs["decoder"].merged({"model": {"embed_dim": None}})
    save_stage(str(tmp_path), glide, tensors=glide.build().state_dict(), clip=None, provenance={})
    assert Bundle.load(str(tmp_path)).configs["decoder"] == glide


# --- exported at the same time, and cut short -------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_stages_that_are_exported_at_the_same_time_are_all_there(
    scheme: str, tmp_path: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    """Every export has read what was there before any of them writes."""
    uri = str(tmp_path / "bundle") if scheme == "local" else f"memory://bundles/{tmp_path.name}"
    names = ("upsampler_256", "upsampler_1024", "prior", "decoder")
    barrier = threading.Barrier(len(names))

    def late(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        barrier.wait(timeout=60)
        yield from tiny_models[name].state_dict().items()

    def export(name: str) -> None:
        clip = OTHER_CLIP if tiny_configs[name].in_clip_space else None
        save_stage(uri, tiny_configs[name], tensors=late(name), clip=clip, provenance={})

    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(export, names))
    assert set(Bundle.load(uri).configs) == set(names)
    storage.remove(uri)


@pytest.mark.parametrize("moment", [0, 1])
def test_an_export_that_is_cut_short_leaves_a_bundle_without_the_stage_or_with_the_old_one(
    bundle: Path,
    moment: int,
    tiny_configs: Mapping[str, StageConfig],
    tiny_models: Mapping[str, nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut before the first and before the second renaming, of the old folder and of the new one; the next export mends it."""
    changed = {key: value + 1 for key, value in tiny_models["upsampler_256"].state_dict().items()}
    rename, calls = Path.rename, iter(range(10))

    def cut(path: Path, target: Any) -> Path:
        if next(calls) == moment:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            save_stage(str(bundle), tiny_configs["upsampler_256"], tensors=changed, clip=None, provenance={})
    left = Bundle.load(str(bundle))
    assert ("upsampler_256" in left.configs) == (moment == 0)
    assert left.load_clip() is not None
    save_stage(str(bundle), tiny_configs["upsampler_256"], tensors=changed, clip=None, provenance={})
    loaded = Bundle.load(str(bundle)).load_model("upsampler_256").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in changed.items())


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_upload_that_is_cut_short_leaves_a_bundle_without_the_stage(
    done: int,
    tmp_path: Path,
    tiny_configs: Mapping[str, StageConfig],
    tiny_models: Mapping[str, nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = f"memory://bundles/{tmp_path.name}"
    for name in ("upsampler_256", "upsampler_1024"):
        save_stage(uri, tiny_configs[name], tensors=tiny_models[name].state_dict(), clip=None, provenance={})
    fs = type(storage.filesystem(uri)[0])
    put, calls = fs.put_file, iter(range(10))

    def cut(self: Any, *args: Any, **kwargs: Any) -> None:
        if next(calls) == done:
            raise ConnectionError
        put(self, *args, **kwargs)

    changed = {key: value + 1 for key, value in tiny_models["upsampler_256"].state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(fs, "put_file", cut)
        with pytest.raises(ConnectionError):
            save_stage(uri, tiny_configs["upsampler_256"], tensors=changed, clip=None, provenance={})
    assert list(Bundle.load(uri).configs) == ["upsampler_1024"]
    save_stage(uri, tiny_configs["upsampler_256"], tensors=changed, clip=None, provenance={})
    assert list(Bundle.load(uri).configs) == ["upsampler_256", "upsampler_1024"]
    storage.remove(uri)


def test_a_replaced_stage_leaves_nothing_of_the_old_one(
    bundle: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    before = sorted(contents(bundle))
    (bundle / "upsampler_256" / "stale").write_text("of the old one")
    tensors = tiny_models["upsampler_256"].state_dict()
    save_stage(str(bundle), tiny_configs["upsampler_256"], tensors=tensors, clip=None, provenance={})
    assert sorted(contents(bundle)) == before
