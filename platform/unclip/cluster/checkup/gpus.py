"""GPUs: those that Ray declares are there, are healthy, idle and linked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ray._private.thirdparty import pynvml as nvml

from unclip.cluster.checkup.result import Finding, failed, ok, skipped, warning

GIB = 2**30
BUSY_SHARE = 0.05
"""Of a GPU's memory: what drivers and displays take without anybody computing."""
HOT_C = 85
_PRODUCT = 2048


@dataclass(frozen=True)
class GpuState:
    """What the driver says of a GPU. ecc: errors that were not corrected since the driver was loaded. remapping: rows of
    memory that wait for a reset to be replaced, or could not be. slowed: why its clocks are held back, empty where not.
    nvlinks: links that are up. None: the GPU does not tell.
    """

    name: str
    memory: int
    memory_used: int
    temperature_c: int
    ecc: int | None
    remapping: bool | None
    slowed: str
    nvlinks: int


def gpus_here() -> list[GpuState]:
    """All GPUs that the driver shows this process, whatever Ray has given it; empty without a driver."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        return [_state(nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _state(handle: Any) -> GpuState:
    def told(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(handle, *arguments)
        except nvml.NVMLError:  # not every GPU knows every question
            return None

    memory, name = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetName(handle)
    rows = told("nvmlDeviceGetRemappedRows")  # corrected, uncorrected, pending, failed
    reasons = told("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    held_back = {
        "heat": nvml.nvmlClocksThrottleReasonSwThermalSlowdown | nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "power supply": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    return GpuState(
        name=name if isinstance(name, str) else name.decode(),
        memory=memory.total,
        memory_used=memory.used,
        temperature_c=told("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU) or 0,
        ecc=told("nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        remapping=None if rows is None else bool(rows[2] or rows[3]),
        slowed=" and ".join(why for why, bits in held_back.items() if reasons & bits),
        nvlinks=sum(told("nvmlDeviceGetNvLinkState", link) == 1 for link in range(nvml.NVML_NVLINK_MAX_LINKS)),
    )


def judge_inventory(states: Sequence[GpuState], declared: float) -> Finding:
    """What the driver has against what Ray declares."""
    if len(states) < declared:
        return failed(
            f"Ray declares {declared:g} GPUs, the driver has {len(states)}",
            "repair or drain the node, or correct --num-gpus; in a container ask for the GPUs (nvidia.com/gpu)",
        )
    if not states:
        return skipped("no GPU")
    if len(states) > declared:
        return warning(
            f"the driver has {len(states)} GPUs, Ray declares {declared:g}", "the others stay unused: see --num-gpus"
        )
    return _judge_health(states)


def _judge_health(states: Sequence[GpuState]) -> Finding:
    broken = [f"GPU {index}: {words}" for index, state in enumerate(states) if (words := _broken(state))]
    if broken:
        return failed("; ".join(broken), "drain the node and reset or replace the GPU; the kernel log has its Xid")
    poor = [f"GPU {index}: {words}" for index, state in enumerate(states) if (words := _poor(state))]
    if poor:
        return warning("; ".join(poor), "end what else uses the GPU; see to its cooling, power and NVLink bridges")
    kinds = " and ".join(sorted({f"{state.name}, {state.memory / GIB:.0f} GiB" for state in states}))
    if len({state.name for state in states}) > 1:
        return warning(f"{len(states)} GPUs of several kinds: {kinds}", "the slowest sets the pace of all")
    hottest, links = max(state.temperature_c for state in states), min(state.nvlinks for state in states)
    return ok(f"{len(states)} x {kinds}, {links} NVLinks each, at most {hottest} °C")


def _broken(state: GpuState) -> str:
    parts = [f"{state.ecc} ECC errors that were not corrected"] if state.ecc else []
    parts += ["memory rows wait to be replaced"] if state.remapping else []
    return ", ".join(parts)


def _poor(state: GpuState) -> str:
    parts = [f"slowed by {state.slowed}"] if state.slowed else []
    parts += [f"{state.temperature_c} °C"] if state.temperature_c > HOT_C else []
    if state.memory_used > BUSY_SHARE * state.memory:
        parts += [f"{state.memory_used / GIB:.1f} GiB in use"]
    return ", ".join(parts)


@dataclass(frozen=True)
class Claimed:
    """What PyTorch sees of the GPUs that a process has claimed. apart: pairs that cannot reach each other's memory."""

    names: list[str]
    apart: list[tuple[int, int]]
    is_right: bool


def compute_here() -> Claimed:
    """Multiplies matrices on every GPU of this process and looks which reach each other."""
    count = torch.cuda.device_count()
    pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
    return Claimed(
        names=[torch.cuda.get_device_name(index) for index in range(count)],
        apart=[pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)],
        is_right=all(_multiplies(torch.device("cuda", index)) for index in range(count)),
    )


def _multiplies(device: torch.device) -> bool:
    """Whether a product of small whole numbers, exact in float32, is the CPU's."""
    left, right = (torch.arange(_PRODUCT * _PRODUCT).reshape(_PRODUCT, _PRODUCT) % prime for prime in (3, 5))
    expected = left[:8].float() @ right.float()
    found = left.float().to(device) @ right.float().to(device)
    return bool(torch.equal(found[:8].cpu(), expected))


def judge_claimed(claimed: Claimed, declared: float) -> Finding:
    if len(claimed.names) != int(declared):
        return failed(
            f"Ray declares {declared:g} GPUs, PyTorch sees {len(claimed.names)}",
            "install a driver and a PyTorch of the same CUDA, and correct --num-gpus or CUDA_VISIBLE_DEVICES",
        )
    if not claimed.is_right:
        return failed("a product of matrices came out wrong", "drain the node and replace the GPU")
    if claimed.apart:
        pairs = ", ".join(f"{first}-{second}" for first, second in claimed.apart[:6])
        return warning(
            f"GPUs {pairs} do not reach each other's memory", "NCCL goes through the host there: see the PCIe topology"
        )
    reach = ", each reaching the others' memory" if len(claimed.names) > 1 else ""
    return ok(f"PyTorch computes on {len(claimed.names)} GPUs{reach}")
