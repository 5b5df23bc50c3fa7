"""CLIPs of transformers: the same embeddings here, and refusals of what open_clip does not build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.karlo import CLIP_SIZE, EMBED_DIM, LENGTH, randomize, text_config, vision_config
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from unclip.interop.base import Source
from unclip.interop.convert import ConvertConfig, run_convert
from unclip.interop.hf_clip_folder import import_hf_clip
from unclip.interop.keys import InteropError
from unclip.models.clip import load_clip

CAPTIONS = ["a red square", "two blue circles on a table"]


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    towers = {}
    for name, config in (("text_config", text_config()), ("vision_config", vision_config())):
        towers[name] = config.to_dict() | {"hidden_act": request.param}
    model = CLIPModel(CLIPConfig(**towers, projection_dim=EMBED_DIM))
    randomize(model)
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=CLIP_SIZE).save_pretrained(folder)
    return folder


def test_the_same_embeddings(theirs: Path, tmp_path: Path) -> None:
    list(run_convert(ConvertConfig(source=str(theirs), kind="hf_clip", out=str(tmp_path / "bundle"))))
    ours, model = load_clip(str(tmp_path / "bundle" / "clip")), CLIPModel.from_pretrained(theirs).eval()
    assert (ours.embed_dim, ours.context_length, ours.image_size) == (EMBED_DIM, LENGTH, CLIP_SIZE)
    tokens = ours.tokenize(CAPTIONS)
    rows = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (2, CLIP_SIZE, CLIP_SIZE, 3), generator=rows, dtype=torch.uint8)
    with torch.no_grad():
        pixels = CLIPImageProcessor.from_pretrained(theirs)(list(pictures.numpy()), return_tensors="pt").pixel_values
        output = model(input_ids=tokens, pixel_values=pixels)
        states = model.text_model(input_ids=tokens).last_hidden_state
        raw = model.visual_projection(model.vision_model(pixels).pooler_output)
        scale = ours(pictures, tokens)[2]
    torch.testing.assert_close(ours.encode_text(tokens), output.text_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encode_image(pictures), output.image_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encode_text_states(tokens)[1], states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encode_image(pictures, unit_norm=False), raw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale, model.logit_scale.exp().clamp(max=100).detach())
    assert (raw.norm(dim=1) - 1).abs().min() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(model_type="siglip"), "model_type = 'siglip'"),
        (lambda config: config["vision_config"].update(hidden_act="relu"), "hidden_act = 'relu'"),
        (lambda config: config["vision_config"].update(intermediate_size=7), "vision_config: intermediate_size = 7"),
        (lambda config: config["text_config"].update(vocab_size=1000, eos_token_id=999), "vocab_size = 1000"),
        (lambda config: config["text_config"].update(rotary=True), "text_config: unknown rotary = True"),
    ],
)
def test_others_are_refused(theirs: Path, change, message: str) -> None:
    path = theirs / "config.json"
    before = path.read_text()
    config = json.loads(before)
    change(config)
    path.write_text(json.dumps(config))
    try:
        with pytest.raises(InteropError, match=message):
            list(import_hf_clip(Source(str(theirs))))
    finally:
        path.write_text(before)
