"""What ended a group of workers, told from what Ray raises: whether it makes sense to try again, and the cause in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError, WorkerGroupError

from unclip.config.base import ConfigError
from unclip.data.manifest import DataError, ReadError
from unclip.pipelines.bundle import BundleError
from unclip.training.checkpoint import CheckpointError, SaveError
from unclip.training.loop import TrainingDiverged

_MISTAKES = (AttributeError, ImportError, NameError, NotImplementedError, TypeError)
FINAL = (ConfigError, DataError, BundleError, CheckpointError, TrainingDiverged, *_MISTAKES)
"""What comes again however often the workers are started: what is wrong with the run, and with the program."""
_PASSING = (ReadError, SaveError)
"""Of those, what a store that is back, or a disk with room, mends."""
_COLLATERAL = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo", "Timed out")
"""What the other workers say, in their collective operations, when one is gone."""


class RunFailed(RuntimeError):
    """A run ended before it was finished; the message says why, where it stands and what to do."""


@contextmanager
def data_errors() -> Iterator[None]:
    """An error in the data as it is, without the layers that Ray puts around what tasks raise."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and type(cause) is not DataError:
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None or cause is error:
            raise
        raise cause from None


def is_final(error: BaseException) -> bool:
    """Whether trying again would end the same way."""
    return any(isinstance(cause, FINAL) and not isinstance(cause, _PASSING) for cause in _causes(error))


def is_preemption(error: BaseException) -> bool:
    """Whether a worker died with a node that had been announced to go."""
    return any(isinstance(cause, RayActorError) and cause.preempted for cause in _causes(error))


def describe(error: BaseException) -> str:
    """The root cause in one line or a few, with the worker that it came from."""
    if not isinstance(error, WorkerGroupError):
        return _words(_innermost(error))
    ranked = sorted(error.worker_failures.items(), key=lambda item: (_weight(item[1]), item[0]))
    rank, first = ranked[0]
    others = ", ".join(str(rank) for rank, _ in ranked[1:9])
    return f"worker {rank}: {_words(_innermost(first))}" + (f" (then workers {others})" if others else "")


def _weight(error: BaseException) -> int:
    """Smaller is nearer to the root: what is wrong with the run, then faults, then deaths, then those left behind."""
    cause = _innermost(error)
    if isinstance(cause, FINAL):
        return 0
    if isinstance(cause, RayActorError):
        return 2
    return 3 if _is_collateral(cause) else 1


def _is_collateral(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _COLLATERAL)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it wraps."""
    yield error
    inner: list[BaseException] = []
    if isinstance(error, WorkerGroupError):
        inner = list(error.worker_failures.values())
    elif isinstance(error, ControllerError):
        inner = [error.controller_failure]
    elif isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        inner = [error.cause]
    else:
        inner = [found for name in ("health_check_failure", "_base_exc") if (found := getattr(error, name, None))]
    for cause in inner:
        yield from _causes(cause)


def _innermost(error: BaseException) -> BaseException:
    *_, last = _causes(error)
    return last


def _words(error: BaseException) -> str:
    if isinstance(error, RayActorError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return "the process died: " + "; ".join(lines[-2:])[:400]
    if _is_collateral(error):  # Ray Train tells what it has seen first, which may not be the death itself
        return f"lost another worker ({str(error)[:160]}…)"
    return f"{type(error).__name__}: {str(error)[:1500]}"
