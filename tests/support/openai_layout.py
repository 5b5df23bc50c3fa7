"""Networks in the layout of OpenAI's code (guided-diffusion, GLIDE) and Karlo's, written from the papers: what theirs compute.

Parameters have the original names and shapes. Only what decides numbers is here, as plainly as it can be said.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that are nowhere zero, so that every one of them counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def time_sinusoids(timesteps: torch.Tensor, width: int) -> torch.Tensor:
    rates = torch.tensor([math.exp(-math.log(10000) * i / (width // 2)) for i in range(width // 2)])
    angles = timesteps.float()[:, None] * rates
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def softmax_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """(…, D, T) and (…, D, S) -> (…, D, T)."""
    scores = query.transpose(-1, -2) @ key / math.sqrt(query.shape[-2]) + bias
    return value @ scores.softmax(dim=-1).transpose(-1, -2)


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, time: int, *, scale_shift: bool, change: str = "") -> None:
        super().__init__()
        self.change, self.scale_shift = change, scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        if self.change == "up":
            return functional.interpolate(x, scale_factor=2, mode="nearest")
        return functional.avg_pool2d(x, 2) if self.change == "down" else x

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[1](self.in_layers[0](x))))
        time = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + time)
        return self.skip_connection(self.resized(x)) + self.out_layers[3](self.out_layers[1](h))


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int, *, context: int | None, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        if context is not None:
            self.encoder_kv = nn.Conv1d(context, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def split(self, packed: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """(B, parts * heads * D, T) -> parts of (B, heads, D, T)."""
        if self.new_order:
            return packed.unflatten(1, (parts, self.heads, -1)).unbind(dim=1)
        return packed.unflatten(1, (self.heads, parts, -1)).unbind(dim=2)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        query, key, value = self.split(self.qkv(self.norm(x).flatten(2)), 3)
        mask: torch.Tensor | float = 0.0
        if context is not None:
            more = self.split(self.encoder_kv(context), 2)
            key, value = torch.cat([more[0], key], dim=-1), torch.cat([more[1], value], dim=-1)
            if bias is not None:
                mask = functional.pad(bias, (0, query.shape[-1]))[:, None, None, :]
        attended = softmax_attention(query, key, value, mask).flatten(1, 2)
        return x + self.proj_out(attended).view_as(x)


class Layer(nn.Sequential):
    def forward(self, x, embedding, context=None, bias=None):  # type: ignore[no-untyped-def,override]
        for part in self:
            if isinstance(part, Attention):
                x = part(x, context, bias)
            else:
                x = part(x, embedding) if isinstance(part, Residual) else part(x)
        return x


class UNet(nn.Module):
    """`attention` are the levels that have some; `middle_attention` None: where any level has."""

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 6,
        channels: int = 128,
        mult: tuple[int, ...] = (1, 2),
        depth: int = 1,
        attention: tuple[int, ...] = (1,),
        head_width: int = 64,
        context: int | None = None,
        scale_shift: bool = True,
        new_order: bool = False,
        classes: int | None = None,
        way_up: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        time = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, time)

        def residual(before: int, after: int, change: str = "") -> Residual:
            return Residual(before, after, time, scale_shift=scale_shift, change=change)

        def attends(width: int, level: int) -> list[nn.Module]:
            heads = width // head_width
            return [Attention(width, heads, context=context, new_order=new_order)] if level in attention else []

        width, skips = channels * mult[0], [channels * mult[0]]
        self.input_blocks = nn.ModuleList([Layer(nn.Conv2d(in_channels, width, 3, padding=1))])
        for level, factor in enumerate(mult):
            for _ in range(depth):
                self.input_blocks.append(Layer(residual(width, factor * channels), *attends(factor * channels, level)))
                width = factor * channels
                skips.append(width)
            if level < len(mult) - 1:
                self.input_blocks.append(Layer(residual(width, width, "down")))
                skips.append(width)
        middle = attends(width, attention[0]) if attention else []
        self.middle_block = Layer(residual(width, width), *middle, residual(width, width))
        if not way_up:
            return
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(mult))):
            for index in range(depth + 1):
                after = mult[level] * channels
                parts = [residual(width + skips.pop(), after), *attends(after, level)]
                if level and index == depth:
                    parts.append(residual(after, after, "up"))
                self.output_blocks.append(Layer(*parts))
                width = after
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))

    def embedded(self, timesteps: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        embedding = self.time_embed(time_sinusoids(timesteps, self.channels))
        return embedding if label is None else embedding + self.label_emb(label)

    def way_down(self, x, embedding, context=None, bias=None):  # type: ignore[no-untyped-def]
        kept = []
        for block in self.input_blocks:
            x = block(x, embedding, context, bias)
            kept.append(x)
        return self.middle_block(x, embedding, context, bias), kept

    def run(self, x, embedding, context=None, bias=None):  # type: ignore[no-untyped-def]
        x, kept = self.way_down(x, embedding, context, bias)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], dim=1), embedding, context, bias)
        return self.out(x)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return self.run(x, self.embedded(timesteps, label))


class Pool(nn.Module):
    def __init__(self, side: int, channels: int, out: int, head_width: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(channels, side * side + 1))
        self.qkv_proj, self.c_proj = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, out, 1)
        self.heads = channels // head_width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2) + self.positional_embedding
        query, key, value = self.qkv_proj(x).unflatten(1, (3, self.heads, -1)).unbind(dim=1)
        return self.c_proj(softmax_attention(query, key, value).flatten(1, 2))[:, :, 0]


class Classifier(UNet):
    def __init__(self, *, side: int, classes: int, **shape) -> None:  # type: ignore[no-untyped-def]
        super().__init__(way_up=False, **shape)
        width = self.channels * shape["mult"][-1]
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), Pool(side, width, classes, 64))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return self.out(self.way_down(x, self.embedded(timesteps))[0])


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | float) -> torch.Tensor:
        packed = self.c_qkv(x).unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 4, 1)  # (3, B, heads, D, L)
        return self.c_proj(softmax_attention(*packed, bias).flatten(1, 2).transpose(1, 2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = _SelfAttention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor, bias: torch.Tensor | float) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), bias)
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, bias)
        return x


class Glide(UNet):
    """GLIDE's base model: (x, timesteps, tokens, mask); with inpainting x has 7 channels, as its caller stacks them."""

    def __init__(self, *, length: int, width: int, depth: int, vocabulary: int, **shape) -> None:  # type: ignore[no-untyped-def]
        super().__init__(context=width, **shape)
        self.transformer, self.final_ln = Transformer(width, depth, width // 64), nn.LayerNorm(width)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.padding_embedding = nn.Parameter(torch.zeros(length, width))
        self.transformer_proj = nn.Linear(width, 4 * self.channels)

    def forward(self, x, timesteps, tokens, mask):  # type: ignore[no-untyped-def,override]
        states = self.token_embedding(tokens) + self.positional_embedding
        states = self.final_ln(self.transformer(torch.where(mask[..., None], states, self.padding_embedding)))
        embedding = self.embedded(timesteps) + self.transformer_proj(states[:, -1])
        return self.run(x, embedding, states.transpose(1, 2))


class KarloPrior(nn.Module):
    def __init__(self, *, length: int, width: int, depth: int, dim: int) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.text_enc_proj, self.text_emb_proj = nn.Linear(dim, width), nn.Linear(dim, width)
        self.clip_img_proj, self.out_proj = nn.Linear(dim, width), nn.Linear(width, dim)
        self.transformer, self.final_ln = Transformer(width, depth, width // 64), nn.LayerNorm(width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, length + 4, width))
        self.prd_emb = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x, timesteps, text_embed, states, mask):  # type: ignore[no-untyped-def]
        time = self.time_embed(time_sinusoids(timesteps, self.prd_emb.shape[-1]))
        ends = [self.text_emb_proj(text_embed), time, self.clip_img_proj(x)]
        sequence = [self.text_enc_proj(states), *(part[:, None] for part in ends), self.prd_emb.expand(len(x), -1, -1)]
        tokens = torch.cat(sequence, dim=1) + self.positional_embedding
        hidden = (
            ~functional.pad(mask, (0, 4), value=True)[:, None, :]
            | torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
        )
        bias = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None]
        return self.out_proj(self.final_ln(self.transformer(tokens, bias))[:, -1])


class KarloDecoder(UNet):
    def __init__(self, *, dim: int, width: int, tokens: int = 4, **shape) -> None:  # type: ignore[no-untyped-def]
        super().__init__(context=width, **shape)
        self.tokens = tokens
        self.clip_emb, self.text_feat_proj = (nn.Linear(dim, 4 * self.channels) for _ in range(2))
        self.text_seq_proj = nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width))
        self.clip_tok_proj = nn.Linear(dim, width * tokens)
        self.cf_param = nn.Parameter(torch.zeros(dim))

    def forward(self, x, timesteps, embed, text_embed, states, mask):  # type: ignore[no-untyped-def,override]
        embedding = self.embedded(timesteps) + self.clip_emb(embed) + self.text_feat_proj(text_embed)
        image = self.clip_tok_proj(embed).view(len(x), -1, self.tokens)  # (B, width, tokens): tokens fastest
        context = torch.cat([image, self.text_seq_proj(states).transpose(1, 2)], dim=2)
        visible = functional.pad(mask, (self.tokens, 0), value=True)
        bias = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        return self.run(x, embedding, context, bias)
