"""How this process's memory is taken from the system and given back."""

from __future__ import annotations

import ctypes
import sys

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
