"""The diffusion prior against diffusers' PriorTransformer, which is Karlo's, on the same random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import PriorTransformer

from unclip.interop.diffusers.networks import prior_entries
from unclip.interop.keys import to_theirs
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
    """Our weights under their names, but for those of captions, which differ: token states are handed in."""
    of_captions = ("prefix.token_embedding.weight", "prefix.null_token", "prefix.null_text_embed")
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in of_captions}
    return to_theirs("prior", prior_entries(model.config), state)[0]


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
