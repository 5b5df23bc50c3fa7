"""Buckets and codes: their errors are bounded, and nothing but the fitted basis decides them."""

from __future__ import annotations

import pytest
import torch

from unclip.models.pca_codec import BUCKET_RANGE, PcaCodec, bucket_centres, to_buckets

D, K = 7, 4


@pytest.fixture
def codec() -> PcaCodec:
    """Of a random basis, with components of very different spread."""
    torch.manual_seed(0)
    codec = PcaCodec(D, K, 64)
    basis, _ = torch.linalg.qr(torch.randn(D, D))
    codec.set(mean=torch.randn(D), components=basis[:K], deviations=torch.tensor([3.0, 1.0, 0.2, 0.01]))
    return codec


@pytest.mark.parametrize(("bound", "count"), [(1.0, 2), (1.0, 1024), (5.0, 7)])
def test_a_bucket_is_half_its_width_from_all_it_holds(bound: float, count: int) -> None:
    values = torch.linspace(-bound, bound, 5001)
    codes = to_buckets(values, bound, count)
    assert codes.min() == 0
    assert codes.max() == count - 1
    assert (codes.diff() >= 0).all()
    assert (bucket_centres(codes, bound, count) - values).abs().max() <= bound / count * (1 + 1e-4)
    every = torch.arange(count)
    assert torch.equal(to_buckets(bucket_centres(every, bound, count), bound, count), every)


def test_values_beyond_belong_to_the_outermost_buckets() -> None:
    assert to_buckets(torch.tensor([-9.0, -1.0, 1.0, 9.0]), 1.0, 8).tolist() == [0, 0, 7, 7]


def test_what_comes_back_is_the_projection_within_half_a_bucket(codec: PcaCodec) -> None:
    inside = torch.rand(100, K) * 2 - 1  # within the range of every component
    scores = inside * BUCKET_RANGE * codec.deviations
    outside = torch.randn(100, D)
    outside -= outside @ codec.components.T @ codec.components
    back = codec.decode(codec.encode(codec.mean + scores @ codec.components + outside))
    errors = ((back - codec.mean) @ codec.components.T - scores).abs()
    assert (errors <= codec.deviations * BUCKET_RANGE / 64 * 1.001).all()
    rest = (back - codec.mean) - (back - codec.mean) @ codec.components.T @ codec.components
    torch.testing.assert_close(rest, torch.zeros_like(rest), atol=1e-5, rtol=0)


def test_codes_are_the_same_in_a_network_of_lower_precision(codec: PcaCodec) -> None:
    z = codec.mean + torch.randn(200, K) * codec.deviations @ codec.components
    codes, network = codec.encode(z), torch.nn.Sequential(codec, torch.nn.Linear(2, 2))
    network.to(torch.bfloat16)
    assert network[1].weight.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in codec.buffers())
    assert torch.equal(codec.encode(z), codes)
    moved = network.to("meta")[0]
    assert all(buffer.device.type == "meta" and buffer.dtype == torch.float32 for buffer in moved.buffers())


def test_codes_follow_from_the_state_dictionary_alone(codec: PcaCodec) -> None:
    other = PcaCodec(D, K, 64)
    other.load_state_dict(codec.state_dict())
    z = torch.randn(50, D)
    assert torch.equal(other.encode(z), codec.encode(z))
    with pytest.raises(RuntimeError, match="components"):
        other.set(mean=torch.zeros(D), components=torch.zeros(K + 1, D), deviations=torch.ones(K))
