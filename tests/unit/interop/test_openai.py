"""ADM's and GLIDE's checkpoints: what comes out computes what the original layout does; what ours has not is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.openai_layout import Classifier, Glide, UNet, randomize
from torch import nn

from unclip.interop.adm import import_adm
from unclip.interop.base import ImportedStage, Source
from unclip.interop.glide import import_glide
from unclip.interop.keys import InteropError
from unclip.interop.torch_files import read_tensors
from unclip.models.conditioners import CaptionCondition, LabelCondition
from unclip.models.decoder import DecoderCondition
from unclip.pipelines.bundle import BundleError
from unclip.pipelines.cascade import GenerationOptions, plan_cascade
from unclip.pipelines.stages import ClassifierStageConfig, DecoderStageConfig

CLASSES = 5
T = torch.tensor([17, 999])
KEPT = torch.zeros(2, dtype=torch.bool)
FLAGS = "--image_size 16 --num_head_channels 64 --learn_sigma True --noise_schedule cosine"


def saved(model: nn.Module, folder: Path) -> str:
    torch.save(model.state_dict(), folder / "model.pt")
    return str(folder / "model.pt")


def built(stage: ImportedStage) -> nn.Module:
    model = stage.config.build()
    model.load_state_dict(dict(stage.tensors))
    return model.eval().requires_grad_(False)


def pictures(channels: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("classes", [None, CLASSES])
@torch.no_grad()
def test_adm_computes_the_same(tmp_path: Path, classes: int | None, new_order: bool) -> None:
    theirs = randomize(UNet(classes=classes, new_order=new_order, mult=(1, 2), attention=(1,), depth=2))
    flags = f"{FLAGS} --class_cond {classes is not None} --use_new_attention_order {new_order} --dropout 0.1"
    (stage,) = import_adm(Source(saved(theirs, tmp_path), flags=flags))
    assert isinstance(stage.config, DecoderStageConfig)
    assert stage.config.diffusion.variance_type == "learned_range"
    assert stage.config.model.unet.dropout == 0.1
    label = torch.tensor([0, CLASSES - 1])
    cond = LabelCondition(label=label if classes else torch.zeros_like(label), dropped=KEPT)
    expected = theirs(pictures(), T, label if classes else None)
    assert_same(built(stage)(pictures(), T, DecoderCondition(label=cond)), expected)
    assert stage.accounts[0].taken == len(theirs.state_dict())


@torch.no_grad()
def test_adms_classifier_computes_the_same(tmp_path: Path) -> None:
    theirs = randomize(Classifier(side=8, classes=CLASSES, mult=(1, 2), depth=2, attention=(0, 1)))
    flags = "--image_size 16 --classifier_depth 2 --classifier_pool attention --classifier_use_fp16 True"
    (stage,) = import_adm(Source(saved(theirs, tmp_path), flags=flags))
    assert isinstance(stage.config, ClassifierStageConfig)
    assert stage.config.diffusion.beta_schedule == "linear"
    assert_same(built(stage)(pictures(), T), theirs(pictures(), T))


@pytest.mark.parametrize("inpainting", [False, True])
@torch.no_grad()
def test_glide_computes_the_same(tmp_path: Path, inpainting: bool) -> None:
    channels = 7 if inpainting else 3
    shape = {"length": 6, "width": 64, "depth": 2, "vocabulary": 40, "mult": (1, 2), "attention": (1,)}
    theirs = randomize(Glide(in_channels=channels, **shape))
    (stage,) = import_glide(Source(saved(theirs, tmp_path)))
    assert stage.config.model.inpainting is inpainting  # type: ignore[union-attr]
    with pytest.raises(BundleError, match=r"model\.text\.vocab_size = 40"):  # of which nothing here makes tokens
        plan_cascade({"decoder": stage.config}, GenerationOptions())
    tokens = torch.tensor([[3, 1, 4, 39, 39, 39]]).expand(2, -1)
    kept = torch.tensor([[True, True, True, False, False, False]])
    # The second caption is dropped, which is the empty one there.
    mask = torch.cat([kept, torch.zeros_like(kept)])
    cond = CaptionCondition(tokens=tokens, mask=kept.expand(2, -1), dropped=torch.tensor([False, True]))
    x, known = pictures(), {}
    if inpainting:
        known = {"known": pictures().flip(0), "known_mask": (pictures(1) > 0).float()}
        x = torch.cat([x, known["known"] * known["known_mask"], known["known_mask"]], dim=1)
    output = built(stage)(pictures(), T, DecoderCondition(text=cond, **known))
    assert_same(output, theirs(x, T, tokens, mask))


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("out.2.bias"), r"out\.2\.bias is missing"),
        (lambda state: state.update(more=torch.zeros(1)), r"more is unknown"),
        (
            lambda state: state.update({"out.0.weight": torch.zeros(3)}),
            r"out\.0\.weight makes \(3,\) where unet\.head_norm",
        ),
        (lambda state: state["out.2.bias"].fill_(float("nan")), r"out\.2\.bias has numbers that are not finite"),
        (
            lambda state: state.update({"input_blocks.2.0.op.weight": torch.zeros(1)}),
            r"input_blocks\.2\.0\.op\.weight.*resblock_updown",
        ),
    ],
)
def test_every_tensor_is_accounted_for(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    state = dict(randomize(UNet()).state_dict())
    change(state)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(InteropError, match=message):
        list(import_adm(Source(str(tmp_path / "model.pt"), flags=FLAGS)))


REFUSED: tuple[tuple[dict[str, object], str, str], ...] = (
    ({"classes": CLASSES}, FLAGS, "class_cond = False, but the weights say True"),
    ({}, f"{FLAGS} --num_channels 64", "num_channels = 64, but the weights say 128"),
    ({}, f"{FLAGS} --attention_resolutions 16,8", r"attention_resolutions = \[8, 16\], but the weights say \[8\]"),
    ({}, f"{FLAGS} --wings 2", "wings"),
    ({}, f"{FLAGS} --attention_resolutions 16", r"attention_resolutions = \[16\], but the weights say \[8\]"),
    ({}, f"{FLAGS} --attention_resolutions some", "attention_resolutions = 'some'"),
    ({}, f"{FLAGS} --noise_schedule 'cosine", "No closing quotation"),
    ({}, f"{FLAGS} --image_size", "--name value pairs"),
    (
        {"attention": (0, 1)},
        FLAGS.replace("--num_head_channels 64", "--num_heads 2"),
        r"num_heads = 2 for attention of widths \[128, 256\]",
    ),
    ({"in_channels": 6}, FLAGS, "6 channels are those of an upsampler"),
    (
        {"channels": 32, "head_width": 32},
        FLAGS.replace("64", "32"),
        "32 channels are normalised in 32 groups there",
    ),
)


@pytest.mark.parametrize(("shape", "flags", "message"), REFUSED)
def test_adm_that_is_not_ours_is_refused(tmp_path: Path, shape: dict[str, object], flags: str, message: str) -> None:
    path = saved(randomize(UNet(**shape)), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InteropError, match=message):
        list(import_adm(Source(path, flags=flags)))


def test_glides_upsampler_is_refused(tmp_path: Path) -> None:
    path = saved(Glide(in_channels=6, length=6, width=64, depth=1, vocabulary=40), tmp_path)
    with pytest.raises(InteropError, match="upsampler, which is told captions; ours is not"):
        list(import_glide(Source(path)))


def test_programs_in_files_are_not_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "hook": Path("x")}, tmp_path / "object.pt")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for name, message in (("object", "tensors alone"), ("script", "tensors alone"), ("list", "no state dictionary")):
        with pytest.raises(InteropError, match=message):
            read_tensors(tmp_path / f"{name}.pt")
