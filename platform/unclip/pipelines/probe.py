"""Whether a network computes here what it computed where its stage was saved: other hardware, libraries, damaged memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.stages import StageName
from unclip.pipelines.stages.probing import probe_outputs

_LOGGER = logging.getLogger(__name__)

ALLOWED: Mapping[tuple[str, torch.dtype], float] = {
    # Measured with up to 374 M weights: 3e-6 in float32 (other numbers of threads, layouts and kernels), 0.016 in bfloat16.
    ("cpu", torch.float32): 2e-5,
    ("cpu", torch.bfloat16): 0.06,
    # Not measured; there is room for kernels that add up in another order.
    ("cuda", torch.float32): 1e-4,
    ("cuda", torch.bfloat16): 0.06,
}
"""Largest deviation of an output, as a share of its largest value, by device and precision."""


def check_probe(
    bundle: Bundle, name: StageName, model: nn.Module, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Compares what the network of stage `name` computes, where it lies, with what is stored in the bundle.

    A stage that was saved without a probe, or a CLIP that is none of the bundle's stages, is let pass with a line in the log.

    Args:
        model: the network as it was loaded, on `device`.
        dtype: its precision, float32 or bfloat16, which says how far it may be off.

    Raises `BundleError` naming the stage, the output that is farthest off, by how much, and what is allowed.
    """
    manifest = bundle.manifests.get(name)
    if manifest is None or manifest.probe is None:
        _LOGGER.warning("%r: stage %s has no probe; what it computes here is not checked", bundle.uri, name)
        return
    device = torch.device(device)
    with _full_precision():
        found = probe_outputs(bundle.configs[name], model, device)
    if {output: len(values) for output, values in found.items()} != {
        output: len(values) for output, values in manifest.probe.items()
    }:
        raise BundleError(f"{bundle.uri!r}: stage {name!r} has a probe of other outputs; export the stage again")
    errors = {output: _error(found[output], values) for output, values in manifest.probe.items()}
    worst, allowed = max(errors, key=errors.__getitem__), ALLOWED[device.type, dtype]
    if errors[worst] > allowed:
        raise BundleError(
            f"{bundle.uri!r}: stage {name!r} does not compute here what it did where it was saved: its {worst} is off by "
            f"{errors[worst]:.2g} of its largest value, and {allowed:g} is allowed in {dtype} on {device}"
        )


def _error(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest deviation as a share of the largest expected value; infinite where there is no number."""
    mine, theirs = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    error = (mine - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(error.nan_to_num(nan=torch.inf))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 without the shorter mantissas that GPUs may take for them."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
