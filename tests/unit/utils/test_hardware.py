"""GPUs are known by the names that their drivers give them."""

from __future__ import annotations

import pytest
import torch

from unclip.utils.hardware import GPUS, find_gpu, peak_flops


@pytest.mark.parametrize(
    ("device_name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla T4", "t4"),
    ],
)
def test_devices_are_found_by_their_own_names(device_name: str, expected: str) -> None:
    gpu = find_gpu(device_name)
    assert gpu is not None
    assert gpu.name == expected


def test_unknown_devices_have_no_peak() -> None:
    assert find_gpu("NVIDIA GeForce RTX 4090") is None
    assert peak_flops(torch.device("meta"), "fp32") is None


def test_a_cpu_is_measured_once() -> None:
    device = torch.device("cpu")
    peak = peak_flops(device, "fp32")
    assert peak is not None
    assert peak > 1e8
    assert peak_flops(device, "fp32") == peak


def test_data_sheets() -> None:
    assert GPUS["h100"].peaks["bf16"] == 989e12
    assert GPUS["a100-80"].peaks == {"fp32": 19.5e12, "bf16": 312e12}
