"""What the steps since the last line of metrics came to, over all workers."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import distributed

_STATUS = Path("/proc/self/status")


class LogWindow:
    """Sums of metrics over the steps that changed something; on the device, so that adding to them waits for nothing."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps in the window, skipped ones among them."""
        self._counted = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._began = time.monotonic()

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Counts a step and the means of its metrics."""
        self.steps += 1
        self._counted += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def skip(self) -> None:
        """Counts a step without a finite gradient, whose metrics say nothing."""
        self.steps += 1

    def images_per_second(self, global_batch_size: int) -> float:
        """Samples of all workers a second since the window began."""
        return self.steps * global_batch_size / max(time.monotonic() - self._began, 1e-9)

    def close(self, world_size: int, device: torch.device) -> tuple[dict[str, float], int]:
        """Means of the metrics over steps and workers, and the most bytes that a worker has used. Collective.

        There are no means where all steps were skipped.
        """
        names = sorted(self._sums)
        values = [torch.as_tensor(self._sums[name]).to(device).double() / self._counted for name in names]
        row = torch.stack([*values, torch.tensor(peak_memory(device), dtype=torch.float64, device=device)])
        rows = [torch.empty_like(row) for _ in range(world_size)]
        if world_size > 1:
            distributed.all_gather(rows, row)
        else:
            rows = [row]
        table = torch.stack(rows).cpu()
        means = table[:, :-1].mean(dim=0).tolist()
        return dict(zip(names, means, strict=True)), int(table[:, -1].max())


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has used at once: allocated on `device` where it is a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
