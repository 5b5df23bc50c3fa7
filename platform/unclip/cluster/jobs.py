"""What a training job's script does with its command line."""

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
    try:
        if arguments.dry_run:
            prepared = check(config)
            print(prepared.config.to_json())
            for manifest, source in zip(prepared.manifests, prepared.order.sources, strict=True):
                print(f"{manifest.uri}: {source.rows} records, {source.samples_per_epoch} trained in each epoch")
            return 0
        summary = fit(config)
    except REFUSALS as error:
        print(f"{config.stage}: {error}", file=sys.stderr)
        return REFUSED
    except RunFailed as error:
        print(f"{config.stage}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{config.stage}: interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(summary, indent=2))
    print(f"run: {config.run}" + (f", bundle: {config.bundle}" if config.bundle else ""))
    return 0
