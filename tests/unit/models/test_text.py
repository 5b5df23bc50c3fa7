from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from unclip.models.clip import Tokenizer
from unclip.models.text import TextTransformer, TextTransformerConfig, caption_mask

CONFIG = TextTransformerConfig(vocab_size=50, context_length=8, width=32, depth=2, heads=4)


@pytest.fixture
def model(randomized: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomized(CONFIG.build())


def first(count: int, length: int = 8) -> torch.Tensor:
    return (torch.arange(length) < count)[None]


def test_tokens_behind_the_mask_do_not_matter(model: nn.Module) -> None:
    tokens = torch.randint(50, (1, 8))
    changed = torch.cat([tokens[:, :5], (tokens[:, 5:] + 1) % 50], dim=1)
    for one, other in zip(model(tokens, first(5)), model(changed, first(5)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.allclose(model(tokens, first(6))[0], model(changed, first(6))[0])


def test_attention_is_not_causal(model: nn.Module) -> None:
    tokens = torch.randint(50, (1, 8))
    changed = tokens.clone()
    changed[0, 4] = (tokens[0, 4] + 1) % 50
    assert not torch.allclose(model(tokens, first(5))[0][:, 0], model(changed, first(5))[0][:, 0])


def test_pooled_is_the_last_real_token(model: nn.Module) -> None:
    tokens = torch.randint(50, (3, 8))
    mask = torch.cat([first(5), first(8), first(0)])
    encodings, pooled = model(tokens, mask)
    torch.testing.assert_close(pooled, encodings[torch.arange(3), torch.tensor([4, 7, 0])])


def test_matches_torch_encoder_layers(model: TextTransformer) -> None:
    """The same weights in `nn.TransformerEncoderLayer` give the same states."""
    tokens, mask = torch.randint(50, (2, 8)), torch.cat([first(8), first(3)])
    x = model.token_embedding(tokens) + model.positional_embedding
    x = torch.where(mask[..., None], x, model.padding_embedding)
    for block in model.transformer.blocks:
        layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True).eval()
        by_part = (4, 3, 8)  # ours: head by head, theirs: all queries, all keys, all values
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": block.qkv.weight.view(*by_part, 32).transpose(0, 1).reshape(96, 32),
                "self_attn.in_proj_bias": block.qkv.bias.view(by_part).transpose(0, 1).reshape(96),
                "self_attn.out_proj.weight": block.attention_out.weight,
                "self_attn.out_proj.bias": block.attention_out.bias,
                "linear1.weight": block.mlp_in.weight,
                "linear1.bias": block.mlp_in.bias,
                "linear2.weight": block.mlp_out.weight,
                "linear2.bias": block.mlp_out.bias,
                "norm1.weight": block.attention_norm.weight,
                "norm1.bias": block.attention_norm.bias,
                "norm2.weight": block.mlp_norm.weight,
                "norm2.bias": block.mlp_norm.bias,
            }
        )
        x = layer(x)
    torch.testing.assert_close(model(tokens, mask)[0], model.transformer.final_norm(x), rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_changes_nothing(randomized: Callable[[nn.Module], nn.Module]) -> None:
    tokens, mask = torch.randint(50, (2, 8)), first(6).expand(2, 8)
    gradients = []
    for checkpointing in (False, True):
        model = randomized(CONFIG.model_copy(update={"activation_checkpointing": checkpointing}).build())
        model(tokens, mask)[0].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_caption_mask_ends_on_the_end_of_text() -> None:
    tokens = torch.from_numpy(Tokenizer(None)(["a red circle!", "", "x " * 50], 8))
    assert caption_mask(tokens).sum(dim=1).tolist() == [6, 2, 8]  # start, a, red, circle, !, end


def test_wrong_shapes_are_named(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 8\) both, the mask bool"):
        model(torch.zeros(1, 7, dtype=torch.long), first(7, 7))
    with pytest.raises(ValueError, match="heads = 5: does not divide width = 32"):
        TextTransformerConfig(context_length=8, width=32, depth=1, heads=5)
