"""Serves a trained bundle: the images API of OpenAI, ours beside it, and a playground at /, until Ctrl-C."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

from unclip.cluster.jobs import exit_status
from unclip.cluster.serve.application import application
from unclip.cluster.serve.server import SERVER_RECIPES, ServerConfig, running
from unclip.config.cli import parse_job


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", SERVER_RECIPES, argv)
    work = _check if arguments.dry_run else _serve
    return exit_status("serve", lambda: work(arguments.config), goes_on="anew")


def _check(config: ServerConfig) -> None:
    application(config)
    print(config.to_json(), end="")


def _serve(config: ServerConfig) -> None:
    with running(config) as address:
        print(f"{address} serves {config.bundle}; Ctrl-C stops it", flush=True)
        try:
            while not threading.Event().wait(1):  # a Ctrl-C that the system gave to another thread is seen in between
                pass
        except KeyboardInterrupt:
            print("stopping: what is under way is finished first", flush=True)


if __name__ == "__main__":
    sys.exit(main())
