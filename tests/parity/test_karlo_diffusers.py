"""Karlo's own files through our bundle into a folder of diffusers: diffusers' networks then compute what Karlo's do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from tests.support.karlo_files import DIM, KarloFiles, Told, make_karlo_files
from torch import nn

from unclip.interop.convert import ConvertConfig, run_convert

T = torch.tensor([17, 999])


@pytest.fixture(scope="module")
def karlo(tmp_path_factory: pytest.TempPathFactory) -> KarloFiles:
    return make_karlo_files(tmp_path_factory.mktemp("karlo"))


@pytest.fixture(scope="module")
def exported(karlo: KarloFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle, out = (tmp_path_factory.mktemp("exported") / name for name in ("bundle", "diffusers"))
    steps = (
        ConvertConfig(source=str(karlo.folder), kind="karlo", clip=karlo.clip_source, out=str(bundle)),
        ConvertConfig(source=str(bundle), to="diffusers", out=str(out)),
    )
    for step in steps:
        list(run_convert(step))
    return out


def assert_same(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_prior(karlo: KarloFiles, exported: Path) -> None:
    prior, told = PriorTransformer.from_pretrained(exported / "prior").eval(), Told.of(karlo.clip)
    x_t = torch.randn(2, DIM, generator=torch.Generator().manual_seed(1))
    output = prior(
        x_t, T, proj_embedding=told.text_embed, encoder_hidden_states=told.states, attention_mask=told.mask
    ).predicted_image_embedding
    assert_same(output, karlo.prior(x_t, T, told.text_embed, told.states, told.mask))


@torch.no_grad()
def test_decoder(karlo: KarloFiles, exported: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(exported / "decoder").eval()
    text_proj, told = UnCLIPTextProjModel.from_pretrained(exported / "text_proj").eval(), Told.of(karlo.clip)
    generator = torch.Generator().manual_seed(1)
    x_t, embed = torch.randn(2, 3, 64, 64, generator=generator), torch.randn(2, DIM, generator=generator)
    context, embedding = text_proj(
        image_embeddings=embed,
        prompt_embeds=told.text_embed,
        text_encoder_hidden_states=told.states,
        do_classifier_free_guidance=False,
    )
    mask = nn.functional.pad(told.mask, (4, 0), value=True).float()
    output = unet(x_t, T, encoder_hidden_states=context, class_labels=embedding, attention_mask=mask).sample
    assert_same(output, karlo.decoder(x_t, T, embed, told.text_embed, told.states, told.mask))


@torch.no_grad()
def test_upsampler(karlo: KarloFiles, exported: Path) -> None:
    x_t = torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(1))
    for name, theirs in (("super_res_first", karlo.first), ("super_res_last", karlo.last)):
        unet = UNet2DModel.from_pretrained(exported / name).eval()
        assert_same(unet(x_t, T).sample, theirs(x_t, T))
