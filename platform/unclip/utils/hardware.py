"""Figures of GPUs: what they compute, hold and exchange, for plans and for the share of it that a run uses.

Rates, memory and links are those of the vendors' data sheets, dense (without structured sparsity) and per direction.
Prices are no facts: they are what an hour of a rented GPU cost about in 2025, for plans to start from.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

GIB = 1024**3
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU as its machines usually have it.

    name: as `--gpu` takes it. label: what of a device's own name tells it. peaks: FLOP/s by precision, `fp32` without TF32,
    which PyTorch leaves off. memory: bytes that programs see. memory_bandwidth: bytes/s. per_node: GPUs of a usual node.
    node_link: bytes/s of a GPU to the others of its node, one direction. cluster_link: the same to other nodes, a GPU's
    share of the node's adapters. price: US dollars an hour, an assumption.
    """

    name: str
    label: str
    peaks: Mapping[str, float]
    memory: float
    memory_bandwidth: float
    node_link: float
    cluster_link: float
    price: float
    per_node: int = 8


def _gpu(name: str, label: str, *, tera: tuple[float, float], memory: tuple[float, float], links: tuple[float, float],
         price: float, per_node: int = 8) -> Gpu:  # fmt: skip
    """tera: fp32 and bf16 TFLOP/s; memory: GB and GB/s; links: GB/s within and between nodes."""
    peaks = {"fp32": tera[0] * _TERA, "bf16": tera[1] * _TERA}
    size, speed = memory
    inside, outside = links
    return Gpu(name, label, peaks, size * GIB, speed * _GIGA, inside * _GIGA, outside * _GIGA, price, per_node)


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", "B200", tera=(75, 2250), memory=(178, 8000), links=(900, 50), price=5.5),
        _gpu("h200", "H200", tera=(67, 989), memory=(140, 4800), links=(450, 50), price=3.5),
        _gpu("h100", "H100", tera=(67, 989), memory=(79.6, 3350), links=(450, 50), price=2.5),
        _gpu("a100-80", "A100.*80GB", tera=(19.5, 312), memory=(79.3, 2039), links=(300, 25), price=1.8),
        _gpu("a100-40", "A100", tera=(19.5, 312), memory=(39.5, 1555), links=(300, 12.5), price=1.3),
        _gpu("l40s", "L40S", tera=(91.6, 362), memory=(44.4, 864), links=(32, 12.5), price=1.1),
        _gpu("a10g", "A10G", tera=(31.5, 70), memory=(22.1, 600), links=(32, 6.25), price=0.8, per_node=4),
        _gpu("v100", "V100", tera=(15.7, 15.7), memory=(31.7, 900), links=(150, 12.5), price=0.9),
        _gpu("t4", "T4", tera=(8.1, 8.1), memory=(14.6, 320), links=(16, 6.25), price=0.35, per_node=4),
    )
}
"""GPUs by name, fastest first. V100 and T4 have no bfloat16 units: bf16 computes there at the rate of float32."""

_BURST_S = 0.5
_PRODUCT = 1024


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak FLOP/s of `device`: of a known GPU by its name, of CPUs the best of matrix products here; else None.

    precision is fp32 or any kind of bf16. CPUs say nothing about what they could do, so the first call for a precision
    multiplies matrices for at most half a second, with the threads that PyTorch has then.
    """
    kind = "fp32" if precision == "fp32" else "bf16"
    if device.type == "cpu":
        return _cpu_peak(kind, torch.get_num_threads())
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peaks[kind]


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that calls itself so ("NVIDIA H100 80GB HBM3"); None where it is none of `GPUS`."""
    return next((gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.label}\b", device_name)), None)


@lru_cache
def _cpu_peak(kind: str, threads: int) -> float:  # noqa: ARG001
    """The best of several products; `threads` only tells answers apart."""
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    left, right = (torch.ones(_PRODUCT, _PRODUCT, dtype=dtype) for _ in range(2))
    out, best, ends = torch.mm(left, right), float("inf"), time.perf_counter() + _BURST_S
    while time.perf_counter() < ends:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * _PRODUCT**3 / best
