"""What jobs' scripts do with their command lines, and how they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence

from unclip.cluster.failures import RunFailed
from unclip.cluster.fit import check, fit
from unclip.cluster.preflight import PreflightError
from unclip.config.base import ConfigError
from unclip.config.cli import parse_job
from unclip.data.manifest import DataError
from unclip.pipelines.bundle import BundleError
from unclip.training.checkpoint import CheckpointError
from unclip.training.config import TrainConfig

REFUSALS = (ConfigError, DataError, BundleError, CheckpointError, PreflightError, OSError)
"""What tells a user that something is wrong with what was asked for; anything else is a fault of ours."""
FAILED = 1
"""Exit status where a run ended before it was finished; the same command goes on with it."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
REFUSED = 2
"""Exit status where nothing was started because something is wrong with what was asked for."""


def train_job(
    description: str | None, recipes: Mapping[str, Callable[[], TrainConfig]], argv: Sequence[str] | None = None
) -> int:
    """Trains one stage as the command line says; the exit status, 0 only when the trained stage is there."""
    arguments = parse_job(description or "", recipes, argv)
    config = arguments.config
    work = _check if arguments.dry_run else _fit
    return exit_status(config.stage, lambda: work(config), goes_on="from the newest checkpoint")


def exit_status(name: str, work: Callable[[], object], *, goes_on: str) -> int:
    """Does the work and says in one line on stderr why it did not come to its end; 0 where it did.

    Args:
        name: of the job.
        goes_on: where the same command goes on after an interruption.
    """
    try:
        work()
    except REFUSALS as error:
        print(f"{name}: {error}", file=sys.stderr)
        return REFUSED
    except RunFailed as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on {goes_on}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _check(config: TrainConfig) -> None:
    prepared = check(config)
    print(prepared.config.to_json())
    for manifest, source in zip(prepared.manifests, prepared.order.sources, strict=True):
        print(f"{manifest.uri}: {source.rows} records, {source.samples_per_epoch} trained in each epoch")


def _fit(config: TrainConfig) -> None:
    summary = fit(config)
    print(json.dumps(summary, indent=2))
    if "cost" in summary:
        print(f"cost: {summary['cost']['text']}")
    print(f"run: {config.run}" + (f", bundle: {config.bundle}" if config.bundle else ""))
