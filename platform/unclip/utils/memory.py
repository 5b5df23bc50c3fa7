"""How this process's memory is taken from the system and given back, how much is free, and what a computation takes."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3)
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keeps what is freed for what is allocated next, until the process ends; returns whether it could be set.

    glibc otherwise gives tensors of some megabytes back at once and takes them anew, every page of which the system fills
    with zeros first: 240,000 pages in a training step of a convolutional upsampler on CPUs, a tenth of its time. Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_TRIM_THRESHOLD, _NEVER)) and bool(mallopt(_MMAP_MAX, 0))


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on `device`: on CPUs within the limit of its control group too."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min(int(psutil.virtual_memory().available), _control_group_room())


def memory_of(compute: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Runs `compute`; bytes of tensors on `device` beyond those there before: at the fullest moment, and left at the end.

    What is left is what others hold of it. On GPUs it is what PyTorch's allocator hands out, workspaces of kernels among it;
    on CPUs tensors are counted, not what kernels take for themselves while they run.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        compute()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    with LiveTensors() as live:
        compute()
    return live.peak, live.bytes


class LiveTensors(TorchDispatchMode):
    """Adds up the storages that operations make, from their making to their end; views and what was there count nothing.

    `bytes` is what there is now, `peak` the most that there was after an operation.

    Args:
        alignment: a storage counts as the next multiple of so many bytes.
    """

    def __init__(self, *, alignment: int = 1) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._alignment = alignment
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor.untyped_storage(), counted=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor.untyped_storage(), counted=True)
        self.peak = max(self.peak, self.bytes)
        return result

    def size(self, tensor: torch.Tensor) -> int:
        """What the storage of a tensor that an operation has made counts."""
        return self._seen[tensor.untyped_storage()._cdata]

    def _enter(self, storage: torch.UntypedStorage, *, counted: bool) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = -(-storage.nbytes() // self._alignment) * self._alignment if counted else 0
            self.bytes += self._seen[key]
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.bytes -= self._seen.pop(key)


def _control_group_room() -> int:
    """Bytes below the limit of a container; without one, more than any machine has."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - used)
