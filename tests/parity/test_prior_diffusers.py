"""The diffusion prior against diffusers' PriorTransformer, which is Karlo's, on the same random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import PriorTransformer

from unclip.models.prior import PriorCondition, PriorConfig, PriorModel

ROWS, LENGTH, D, WIDTH, HEADS, DEPTH = 3, 8, 6, 32, 4, 2
CONFIG = PriorConfig(embed_dim=D, vocab_size=50, context_length=LENGTH, width=WIDTH, depth=DEPTH, heads=HEADS)


@pytest.fixture(scope="module")
def ours() -> PriorModel:
    generator = torch.Generator().manual_seed(0)
    model = CONFIG.build().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 1 else 0.2))
    return model


@pytest.fixture(scope="module")
def theirs(ours: PriorModel) -> PriorTransformer:
    """With token states handed in where ours looks them up."""
    model = PriorTransformer(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=DEPTH,
        embedding_dim=D,
        num_embeddings=LENGTH,
        additional_embeddings=4,
        encoder_hid_proj_type=None,
    )
    model.load_state_dict(mapped(ours) | {"clip_mean": torch.zeros(1, D), "clip_std": torch.ones(1, D)})
    return model.eval().requires_grad_(False)


def mapped(model: PriorModel) -> dict[str, torch.Tensor]:
    """Our weights under their names."""
    state = {
        "positional_embedding": model.positional_embedding[None],
        "prd_embedding": model.query[None, None],
    }
    modules = {
        "time_embedding.linear_1": model.time_embed.layers[0],
        "time_embedding.linear_2": model.time_embed.layers[2],
        "proj_in": model.image_embed_in,
        "embedding_proj": model.prefix.text_embed_in,
        "norm_out": model.transformer.final_norm,
        "proj_to_clip_embeddings": model.image_embed_out,
    }
    for index, block in enumerate(model.transformer.blocks):
        name = f"transformer_blocks.{index}"
        # Ours are packed head by head: query, key and value of the first head, then of the second.
        weights = block.qkv.weight.view(HEADS, 3, -1, WIDTH).transpose(0, 1).reshape(3, WIDTH, WIDTH)
        biases = block.qkv.bias.view(HEADS, 3, -1).transpose(0, 1).reshape(3, WIDTH)
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            state |= {f"{name}.attn1.to_{part}.weight": weight, f"{name}.attn1.to_{part}.bias": bias}
        modules |= {
            f"{name}.norm1": block.attention_norm,
            f"{name}.attn1.to_out.0": block.attention_out,
            f"{name}.norm3": block.mlp_norm,
            f"{name}.ff.net.0.proj": block.mlp_in,
            f"{name}.ff.net.2": block.mlp_out,
        }
    for name, module in modules.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return state


@pytest.mark.parametrize("prepared", [False, True])
def test_same_weights_give_the_same_embedding(ours: PriorModel, theirs: PriorTransformer, prepared: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x_t, timesteps = torch.randn(ROWS, D, generator=generator), torch.tensor([3, 500, 999])
    cond = PriorCondition(
        text_embed=torch.nn.functional.normalize(torch.randn(ROWS, D, generator=generator), dim=1),
        tokens=torch.randint(50, (ROWS, LENGTH), generator=generator),
        text_mask=torch.arange(LENGTH) < torch.tensor([[5], [8], [2]]),
        text_dropped=torch.zeros(ROWS, dtype=torch.bool),
    )
    expected = theirs(
        x_t,
        timesteps,
        proj_embedding=cond.text_embed * D**0.5,
        encoder_hidden_states=ours.prefix.token_embedding(cond.tokens),
        attention_mask=cond.text_mask,
    ).predicted_image_embedding
    output = ours(x_t, timesteps, ours.prepare(cond) if prepared else cond)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
