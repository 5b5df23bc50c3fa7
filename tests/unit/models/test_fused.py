"""What is computed again instead of kept has the values and the gradients of the plain layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from unclip.models import fused
from unclip.models.fused import GeluLinear, Resample, SiluConv2d, recomputing_attention, resampled


@pytest.mark.parametrize("resample", ["no", "down", "up"])
def test_convolution_of_silu_passes_gradcheck(resample: Resample) -> None:
    torch.manual_seed(0)
    conv = SiluConv2d(3, 5).double()
    y = torch.randn(2, 3, 4, 6, dtype=torch.double, requires_grad=True)
    expected = functional.conv2d(resampled(functional.silu(y), resample), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(y, resample), expected)
    with torch.no_grad():
        torch.testing.assert_close(conv(y.clone(), resample), expected)
    parameters = [parameter.detach().requires_grad_() for parameter in conv.parameters()]
    assert torch.autograd.gradcheck(
        lambda y, *values: torch.func.functional_call(
            conv, dict(zip(["weight", "bias"], values, strict=True)), (y, resample)
        ),
        (y, *parameters),
    )


def test_linear_layer_of_gelu_passes_gradcheck() -> None:
    torch.manual_seed(0)
    linear = GeluLinear(4, 3).double()
    y = torch.randn(2, 5, 4, dtype=torch.double, requires_grad=True)
    expected = functional.linear(functional.gelu(y), linear.weight, linear.bias)
    torch.testing.assert_close(linear(y), expected)
    with torch.no_grad():
        torch.testing.assert_close(linear(y), expected)
    parameters = [parameter.detach().requires_grad_() for parameter in linear.parameters()]
    assert torch.autograd.gradcheck(
        lambda y, *values: torch.func.functional_call(linear, dict(zip(["weight", "bias"], values, strict=True)), (y,)),
        (y, *parameters),
    )


@pytest.mark.parametrize("at_once", [1, 1000])
@pytest.mark.parametrize("mask_rows", [0, 1, 2])
def test_attention_passes_gradcheck(mask_rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample after the other, and both together."""
    monkeypatch.setattr(fused, "_WEIGHTS_AT_ONCE", at_once)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, length, 4, dtype=torch.double, requires_grad=True) for length in (5, 7, 7)]
    mask = (torch.rand(mask_rows, 1, 5, 7) < 0.7) | (torch.arange(7) == 0) if mask_rows else None
    expected = functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
    torch.testing.assert_close(recomputing_attention(*inputs, mask), expected)
    assert torch.autograd.gradcheck(lambda *tensors: recomputing_attention(*tensors, mask), tuple(inputs))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_doubling_repeats_the_nearest(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.double).contiguous(memory_format=memory_format).requires_grad_()
    torch.testing.assert_close(resampled(x, "up"), functional.interpolate(x, scale_factor=2, mode="nearest"))
    assert torch.autograd.gradcheck(lambda x: resampled(x, "up"), x)


def _kept(run: Callable[[], torch.Tensor]) -> set[int]:
    """Numbers of elements of what autograd keeps."""
    sizes: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.add(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sizes


def test_only_the_input_is_kept() -> None:
    y, states = torch.randn(1, 2, 6, 6, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    conv, linear = SiluConv2d(2, 3), GeluLinear(4, 3)
    assert _kept(lambda: conv(y, "up")) == {y.numel(), conv.weight.numel()}
    assert _kept(lambda: linear(states)) == {states.numel(), linear.weight.numel()}
    heads = [torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3)]
    assert _kept(lambda: recomputing_attention(*heads, None)) == {64}


@pytest.mark.parametrize("layer", [SiluConv2d(8, 8), GeluLinear(8, 8)])
def test_under_autocast_as_the_plain_layers(layer: nn.Module) -> None:
    """Products in bfloat16, float32 gradients of weights and input, equal to rounding."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 8, 8)
    results = []
    for is_fused in (True, False):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if is_fused:
                output = layer(given)
            elif isinstance(layer, nn.Conv2d):
                output = functional.conv2d(functional.silu(given), layer.weight, layer.bias, padding=1)
            else:
                output = functional.linear(functional.gelu(given), layer.weight, layer.bias)
        assert output.dtype == torch.bfloat16
        results.append((output, *torch.autograd.grad(output.float().square().mean(), [given, *layer.parameters()])))
    assert all(tensor.dtype == torch.float32 for tensor in results[0][1:])
    torch.testing.assert_close(results[0], results[1], rtol=2**-7, atol=2**-9)
