"""What DeepSpeed needs to keep training state off the device: its settings, disk operator and swap folders."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import nn

from unclip.config.base import ConfigError

Offload = Literal["none", "cpu", "nvme"]
"""Where state lies: on the device, in host memory, in files of a local disk."""

_SUB_GROUP = 50_000_000
"""Elements of this rank's state that are in memory at once where it lies on disk; five float32 buffers, 1 GB."""
_STATES = 5
"""What a swapped-in group holds: weights, gradient, two moments and the moving average."""
_FOLDERS = "swap-*"


def offload_settings(
    module: nn.Module, *, optimizer: Offload, parameters: Offload, folder: Path | None, world_size: int
) -> dict[str, Any]:
    """The part of DeepSpeed's `zero_optimization` for `optimizer` and `parameters`; {} where both are none."""
    settings: dict[str, Any] = {}
    place = {"nvme_path": str(folder)} if folder else {}
    if optimizer != "none":
        settings["offload_optimizer"] = {"device": optimizer, "buffer_count": _STATES, **place}
    if parameters != "none":
        settings["offload_param"] = {"device": parameters, **place}
    if "nvme" in (optimizer, parameters):
        settings["sub_group_size"] = _SUB_GROUP
    if parameters == "nvme":
        largest = max(-(-parameter.numel() // world_size) for parameter in module.parameters())
        most = max(len(list(part.parameters(recurse=False))) for part in module.modules())
        # A module's own parameters are read at once, and as many ahead of their use. None is left in memory for good.
        settings["offload_param"] |= {"buffer_size": largest, "buffer_count": 2 * most + 1, "max_in_cpu": 0}
    return settings


@cache
def require_disk_operator() -> None:
    """Builds DeepSpeed's asynchronous file reader and writer, a minute on its first use on a machine.

    Raises `ConfigError` where it cannot be built.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # whatever compiler and loader raise
        raise ConfigError(
            "zero.offload_optimizer or zero.offload_parameters = 'nvme': DeepSpeed's async_io operator cannot be built "
            f"on this machine; it needs a C++ compiler, ninja and the headers of libaio (libaio-dev): {error}"
        ) from error


def keep_gradients_in_memory(swapper: Any) -> None:
    """Makes DeepSpeed's swapper of optimizer state (0.19.8) leave gradients where they are: in host memory, whole.

    It would write them to files beside that, and read them back into the middle of a buffer, at an address that is no
    multiple of a disk's block. Such a read fails without a word, and the step takes the buffer's old content for gradients.
    """

    def keep(parameter: torch.Tensor, gradient_offsets: list[int], gradient_tensors: list[torch.Tensor]) -> None:
        swapped = swapper.swap_params_info[swapper.parameter_id(parameter)]
        swapped.unswapped_gradients.update(zip(gradient_offsets, gradient_tensors, strict=True))

    swapper.swap_out_gradients = keep


class SwapFolder:
    """A new folder in `parent` for what this process swaps out, gone when the process or this object is.

    The folder is locked as long as it is in use; those that killed processes left behind are not, and are deleted.
    """

    def __init__(self, parent: str) -> None:
        base = Path(parent)
        try:
            base.mkdir(parents=True, exist_ok=True)
            with _locked(base / ".lock"):
                for left in base.glob(_FOLDERS):
                    with suppress(FileNotFoundError):  # a process that ends just now deletes its own
                        if _try_lock(left / ".lock") is not None:
                            shutil.rmtree(left, ignore_errors=True)
                self.path = Path(tempfile.mkdtemp(prefix=_FOLDERS.rstrip("*"), dir=base))
                held = _try_lock(self.path / ".lock")
        except OSError as error:
            raise ConfigError(f"zero.nvme_path = {parent!r} cannot be written: {error}") from error
        self._remove = weakref.finalize(self, _remove, self.path, held)

    def close(self) -> None:
        """Deletes the folder."""
        self._remove()


def _remove(path: Path, held: IO[str] | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if held:
        held.close()


def _try_lock(path: Path) -> IO[str] | None:
    """The locked file, to be kept open; None where another process holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
