from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
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
    """Changes a stage's tensors and makes bundle.json agree, so that only the tensors themselves are wrong."""
    weights = bundle / name / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    stored = {"bytes": weights.stat().st_size, "sha256": sha256_file(weights)}
    edit_json(bundle / "bundle.json", lambda index: index["stages"][name].update(weights=stored))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip_is_exact(
    tiny_bundle: str, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    bundle = Bundle.load(tiny_bundle)
    assert tuple(bundle.configs) == STAGE_NAMES
    assert dict(bundle.configs) == dict(tiny_configs)
    for name in STAGE_NAMES:
        loaded, expected = bundle.load_model(name).state_dict(), tiny_models[name].state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert bundle.index.stages["prior"].provenance == {"step": 7}
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


def test_digest_follows_the_weights(
    bundle: Path, tiny_bundle: str, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    before = Bundle.load(tiny_bundle).digest
    assert Bundle.load(str(bundle)).digest == before
    changed = {key: value + 1 for key, value in tiny_models["upsampler_256"].state_dict().items()}
    save_stage(str(bundle), tiny_configs["upsampler_256"], tensors=changed, clip=None, provenance={})
    assert Bundle.load(str(bundle)).digest != before


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle: it has no bundle.json"):
        Bundle.load(str(tmp_path))
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match=r"bundle.json' is not valid JSON"):
        Bundle.load(str(tmp_path))


def test_another_schema_version_is_refused(bundle: Path) -> None:
    edit_json(bundle / "bundle.json", lambda index: index.update(schema_version=2))
    with pytest.raises(BundleError, match=r"schema_version = 2; this version of unclip reads 1"):
        Bundle.load(str(bundle))


def test_unknown_keys_are_refused(bundle: Path, tmp_path: Path) -> None:
    edit_json(bundle / "prior" / "config.json", lambda config: config.update(num_drawz=3))
    with pytest.raises(BundleError, match=r"prior/config.json.*num_drawz: unknown field; did you mean 'num_draws'"):
        Bundle.load(str(bundle))
    edit_json(bundle / "bundle.json", lambda index: index.update(extra=1))
    with pytest.raises(BundleError, match=r"bundle.json.*extra: unknown field"):
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
    shutil.rmtree(bundle / "decoder")
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


def test_a_missing_stage_is_named(bundle: Path) -> None:
    edit_json(bundle / "bundle.json", lambda index: index["stages"].pop("decoder"))
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
    assert Bundle.load(uri).index.clip == OTHER_CLIP
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == ["bundle.json", "prior"]


def test_a_stage_of_another_clip_is_not_loaded(bundle: Path) -> None:
    edit_json(bundle / "bundle.json", lambda index: index["stages"]["prior"].update(clip_fingerprint="e" * 64))
    with pytest.raises(BundleError, match=f"stage 'prior' belongs to the CLIP with fingerprint {'e' * 64}"):
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


def test_only_upsamplers_come_without_a_clip(
    tmp_path: Path, tiny_configs: Mapping[str, StageConfig], tiny_models: Mapping[str, nn.Module]
) -> None:
    tensors = tiny_models["prior"].state_dict()
    with pytest.raises(BundleError, match=r"stage 'prior': clip = None"):
        save_stage(str(tmp_path), tiny_configs["prior"], tensors=tensors, clip=None, provenance={})
