"""What every measurement needs: seconds, FLOPs, peak memory, the machine's matrix rate and its description.

Imported in the peers' environments too: standard library and PyTorch only.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_BURST_SECONDS = 0.2
_MATRIX_SIZE = {"cpu": 4096, "cuda": 8192}

Run = Callable[[], object]


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's queued work included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def flops(run: Run) -> int:
    """Floating-point operations of one call in matrix products, convolutions and attention; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


class MatrixRate:
    """The machine's rate of square matrix products, the most that a network could reach.

    Each call is one burst of about 0.2 s; take the median of bursts between the runs that they are compared with.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int | None = None) -> None:
        self.device = device
        self.size = _MATRIX_SIZE[device.type] if size is None else size
        shape = (self.size, self.size)
        self._left, self._right, self._out = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        self._repeats = max(1, round(_BURST_SECONDS / self._seconds(1)))

    def __call__(self) -> float:
        """FLOP/s of one burst."""
        return self._repeats * 2 * self.size**3 / self._seconds(self._repeats)

    def _seconds(self, repeats: int) -> float:
        def burst() -> None:
            for _ in range(repeats):
                torch.mm(self._left, self._right, out=self._out)

        return seconds(burst, self.device)


class PeakMemory:
    """Bytes that steps take beyond what a process held when this was made; one process measures one side once.

    On CPUs the resident size, whose high-water mark Linux lets a process reset: without that, whatever construction took for
    a moment would hide the steps. On GPUs what PyTorch had allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = self._peak()

    def bytes(self) -> int:
        return self._peak() - self._before

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on: processor, threads, versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def version(package: str) -> str:
    return metadata.version(package)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
