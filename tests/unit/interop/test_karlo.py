"""Karlo's own files against the layout's plain forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tests.support.karlo_files import DIM, LENGTH, KarloFiles, Told, make_karlo_files
from torch import nn

from unclip.interop.base import ImportedStage, Source
from unclip.interop.karlo import import_karlo
from unclip.interop.keys import InteropError
from unclip.models.conditioners import CaptionCondition, ImageCondition
from unclip.models.decoder import DecoderCondition
from unclip.models.prior import PriorCondition
from unclip.models.upsampler import UpsamplerCondition
from unclip.pipelines.stages import PriorStageConfig, UpsamplerStageConfig

T = torch.tensor([17, 999])


@pytest.fixture(scope="module")
def karlo(tmp_path_factory: pytest.TempPathFactory) -> KarloFiles:
    return make_karlo_files(tmp_path_factory.mktemp("karlo"))


@pytest.fixture(scope="module")
def stages(karlo: KarloFiles) -> dict[str, ImportedStage]:
    source = Source(str(karlo.folder), clip=karlo.clip_source)
    return {stage.config.kind: stage for stage in import_karlo(source)}


def built(stage: ImportedStage) -> nn.Module:
    model = stage.config.build()
    model.load_state_dict(dict(stage.tensors))
    return model.eval().requires_grad_(False)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@torch.no_grad()
def test_prior_computes_the_same(karlo: KarloFiles, stages: dict[str, ImportedStage]) -> None:
    stage, told = stages["prior"], Told.of(karlo.clip)
    x_t = torch.randn(2, DIM, generator=torch.Generator().manual_seed(1))
    expected = karlo.prior(x_t, T, told.text_embed, told.states, told.mask)
    unit = nn.functional.normalize(told.text_embed[:1], dim=1).expand(2, -1)
    mask = told.mask[:1].expand(2, -1)
    model = built(stage)
    cond = PriorCondition(text_embed=unit, tokens=told.tokens, text_mask=mask, text_dropped=told.dropped)
    assert_same(model(x_t, T, cond), expected)
    assert_same(model(x_t, T, model.prepare(cond)), expected)
    assert isinstance(stage.config, PriorStageConfig)
    embed = stage.config.stage(model).finish(x_t)  # as Karlo leaves its prior: whitening undone, of no particular norm
    torch.testing.assert_close(embed, x_t * torch.linspace(0.5, 2, DIM) + torch.linspace(-1, 1, DIM))


@torch.no_grad()
def test_decoder_computes_the_same(karlo: KarloFiles, stages: dict[str, ImportedStage]) -> None:
    stage, told = stages["decoder"], Told.of(karlo.clip)
    generator = torch.Generator().manual_seed(1)
    x_t, embed = torch.randn(2, 3, 16, 16, generator=generator), torch.randn(1, DIM, generator=generator)
    given = torch.cat([embed, karlo.decoder.cf_param[None]])
    expected = karlo.decoder(x_t, T, given, told.text_embed, told.states, told.mask)
    mask = told.mask[:1].expand(2, -1)
    cond = DecoderCondition(
        image=ImageCondition(embed=embed.expand(2, -1), dropped=told.dropped),
        text=CaptionCondition(tokens=told.tokens, mask=mask, dropped=told.dropped),
    )
    assert_same(built(stage)(x_t, T, cond), expected)


@torch.no_grad()
def test_upsampler_takes_its_last_step_with_the_second_network(
    karlo: KarloFiles, stages: dict[str, ImportedStage]
) -> None:
    stage = stages["upsampler_256"]
    generator = torch.Generator().manual_seed(1)
    x_t, low_res = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    timesteps = torch.tensor([166, 0])
    both = torch.cat([x_t, low_res], dim=1)
    expected = torch.cat([karlo.first(both[:1], timesteps[:1]), karlo.last(both[1:], timesteps[1:])])
    assert_same(built(stage)(x_t, timesteps, UpsamplerCondition(low_res=low_res)), expected)
    assert isinstance(stage.config, UpsamplerStageConfig)
    assert stage.config.sampling.timesteps(1000) == [999, 832, 666, 500, 333, 166, 0]  # Karlo's README: "7"


def test_bundles_clip_is_the_one_that_was_named(karlo: KarloFiles, stages: dict[str, ImportedStage]) -> None:
    assert [stage.clip and stage.clip.fingerprint for stage in stages.values()] == [karlo.clip.fingerprint] * 2 + [None]


@pytest.fixture
def copy(karlo: KarloFiles, tmp_path: Path) -> Path:
    """The folder, for tests that spoil it."""
    for path in karlo.folder.glob("*.*"):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_refuses_what_it_cannot_know(karlo: KarloFiles, copy: Path) -> None:
    with pytest.raises(InteropError, match=r"clip: required, as ViT-L-14\.pt is a TorchScript archive"):
        list(import_karlo(Source(str(copy))))
    (copy / "ViT-L-14_stats.th").unlink()
    with pytest.raises(InteropError, match=r"go together; one is missing"):
        list(import_karlo(Source(str(copy), clip=karlo.clip_source)))
    with pytest.raises(InteropError, match="has none of prior-ckpt"):
        list(import_karlo(Source(str(copy / "nothing"), clip=karlo.clip_source)))


def test_a_part_alone_is_taken_over(copy: Path) -> None:
    for name in ("prior-ckpt-step=1.ckpt", "ViT-L-14_stats.th", "decoder-ckpt-step=1.ckpt"):
        (copy / name).unlink()
    assert [stage.config.kind for stage in import_karlo(Source(str(copy)))] == ["upsampler_256"]


def test_yaml_files_are_held_against_the_weights(karlo: KarloFiles, copy: Path) -> None:
    hparams = {"text_ctx": LENGTH, "xf_width": 128, "xf_layers": 2, "xf_heads": 2, "clip_dim": DIM}
    diffusion = {"steps": 1000, "predict_xstart": True, "noise_schedule": "squaredcos_cap_v2"}
    settings = {"model": {"type": "prior", "hparams": hparams}, "diffusion": diffusion}
    (copy / "prior.yaml").write_text(yaml.safe_dump(settings))
    source = Source(str(copy), clip=karlo.clip_source)
    assert next(iter(import_karlo(source))).config.kind == "prior"
    hparams["xf_heads"] = 4
    (copy / "prior.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InteropError, match=r"prior: xf_heads = 4 in its YAML file: 2 is what"):
        list(import_karlo(source))
