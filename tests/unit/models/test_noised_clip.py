from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from unclip.config.base import ConfigError
from unclip.models.noised_clip import NoisedClipConfig, NoisedClipModel

END = 19
TEXT = {"vocab_size": END + 1, "context_length": 6, "width": 16, "depth": 1, "heads": 2}
TINY = {"embed_dim": 8, "image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 4, "text": TEXT}
Randomized = Callable[[nn.Module], nn.Module]


def tiny(randomized: Randomized, **changes: Any) -> NoisedClipModel:
    model = NoisedClipConfig.from_dict(TINY | changes).build()
    assert isinstance(randomized(model), NoisedClipModel)
    return model


def pictures(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.tensor([0, 40, 999])[:count]


def test_glides_vit_l_is_openais_with_other_patches_and_a_timestep() -> None:
    """GLIDE, section 4.4: ViT-L on 64 pixels with patches of 4: as many patches as ViT-L/14 has on 224 pixels."""
    text = {"context_length": 77, "width": 768, "depth": 12, "heads": 12}
    shape = {"embed_dim": 768, "image_size": 64, "patch_size": 4, "width": 1024, "depth": 24, "heads": 16, "text": text}
    with torch.device("meta"):
        ours = NoisedClipConfig.from_dict(shape).build()
        theirs = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14"))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    count += 3 * (4**2 - 14**2) * 1024  # patches
    count += 2 * (1024**2 + 1024) - 1024  # the timestep's network in place of the class token
    count += 77 * 768  # our text transformer's padding
    assert sum(parameter.numel() for parameter in ours.parameters()) == count


def test_the_picture_tower_is_open_clips_with_the_timestep_as_class_token(randomized: Randomized) -> None:
    model = tiny(randomized)
    tower, width, heads = model.picture_tower, 32, 4
    reference = VisionTransformer(16, 4, width, layers=2, heads=heads, mlp_ratio=4.0, output_dim=8).eval()
    state = {
        "positional_embedding": tower.positions,
        "conv1.weight": tower.patches.weight,
        "proj": tower.projection.weight.T,
    }
    named = {"ln_pre": tower.input_norm, "ln_post": tower.transformer.final_norm}
    for index, block in enumerate(tower.transformer.blocks):
        prefix = f"transformer.resblocks.{index}"
        named |= {f"{prefix}.ln_1": block.attention_norm, f"{prefix}.ln_2": block.mlp_norm}
        named |= {f"{prefix}.mlp.c_fc": block.mlp_in, f"{prefix}.mlp.c_proj": block.mlp_out}
        named |= {f"{prefix}.attn.out_proj": block.attention_out}
        # Ours are packed head by head, theirs with the queries of all heads first.
        order = torch.arange(3 * width).view(heads, 3, width // heads).transpose(0, 1).flatten()
        state |= {f"{prefix}.attn.in_proj_{part}": getattr(block.qkv, part)[order] for part in ("weight", "bias")}
    state |= {f"{name}.{part}": getattr(layer, part) for name, layer in named.items() for part in ("weight", "bias")}
    x_t, timesteps = pictures()
    for row in range(3):
        with torch.no_grad():
            state["class_embedding"] = tower.time_embed(timesteps[row : row + 1], torch.float32)[0]
            reference.load_state_dict(state)
            torch.testing.assert_close(tower(x_t, timesteps)[row], reference(x_t)[row], rtol=1e-4, atol=1e-4)


def test_embeddings_have_unit_norm_and_depend_on_their_own_inputs(randomized: Randomized) -> None:
    model, (x_t, timesteps) = tiny(randomized), pictures()
    image = model.encode_image(x_t, timesteps)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    assert (model.encode_image(x_t, timesteps.flip(0))[[0, 2]] - image[[0, 2]]).abs().max() > 1e-3
    torch.testing.assert_close(model.encode_image(x_t[1:2], timesteps[1:2])[0], image[1])
    tokens = torch.tensor([[1, 5, END, 0, 0, 0], [1, 6, END, 0, 0, 0], [1, 5, END, 7, 8, 9]])
    text = model.encode_text(tokens)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text[0], text[2])  # what stands behind the end does not count
    assert (text[0] - text[1]).abs().max() > 1e-3


def test_the_logit_scale_starts_as_clips_and_is_bounded() -> None:
    model = NoisedClipConfig.from_dict(TINY).build()
    assert float(model.logit_scale.detach()) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(math.log(500))
    assert float(model.logit_scale.detach()) == 100


def test_bfloat16_networks_give_float32_embeddings(randomized: Randomized) -> None:
    model, (x_t, timesteps) = tiny(randomized), pictures()
    expected = model.encode_image(x_t, timesteps)
    found = model.bfloat16().encode_image(x_t, timesteps)
    assert found.dtype == torch.float32
    assert (found * expected).sum(dim=1).min() > 0.99


def test_pictures_of_another_size_are_refused(randomized: Randomized) -> None:
    with pytest.raises(ValueError, match=r"x_t is \(1, 3, 8, 8\): expected \(B, 3, 16, 16\)"):
        tiny(randomized).encode_image(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "patch_size = 5: does not divide image_size = 16"),
        ({"heads": 5}, "heads = 5: does not divide width = 32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NoisedClipConfig.from_dict(TINY | changes)
