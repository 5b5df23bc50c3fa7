"""Draws the curves of one run or several to a PNG: `python jobs/watch.py RUN [RUN …]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.config.cli import parse_flags
from unclip.training.reporting.curves import draw_curves
from unclip.training.reporting.panel import RunPanel
from unclip.training.reporting.run_tail import RunTail
from unclip.training.reporting.terminal import Screen
from unclip.training.run_folder import RunFolder
from unclip.utils import storage


class WatchConfig(Config):
    """Which runs, and for how long."""

    runs: tuple[str, ...] = Field(min_length=1)
    """Run folders, local or `s3://`."""
    out: str = "curves.png"
    """The picture, local or `s3://`."""
    follow: bool = False
    """Shows the runs on the terminal too, and draws again until all of them have ended or nobody trains them."""
    every_s: float = Field(default=10.0, gt=0)
    """Seconds between two pictures of runs that are followed."""


SILENT_S = 30.0
"""Without a change of its file, which it writes every ten seconds, a driver counts as gone."""


class Driver:
    """The process that trains a run, by the file that it keeps writing."""

    def __init__(self, run: RunFolder) -> None:
        self._uri = run.driver_uri
        self._sign = b""
        self._since = time.monotonic()

    def is_gone(self) -> bool:
        """Whether nobody trains the run: there is no such file, or it has not changed for long."""
        try:
            sign = storage.read_bytes(self._uri)
        except FileNotFoundError:
            return True
        if sign != self._sign:
            self._sign, self._since = sign, time.monotonic()
        return time.monotonic() - self._since > SILENT_S


def follow(config: WatchConfig, runs: Sequence[RunFolder]) -> None:
    """Until each run has stored what it came to or has no driver any more, or Ctrl-C."""
    tails = [RunTail(run) for run in runs]
    panels = [RunPanel(_stage(run), run.uri) for run in runs]
    drivers = [Driver(run) for run in runs]
    screen = Screen(panels)
    try:
        while True:
            gone = [driver.is_gone() for driver in drivers]  # before the summaries: a driver stores one, then goes
            summaries = [run.summary() for run in runs]  # before the tails: what they miss then is nothing
            for tail, panel in zip(tails, panels, strict=True):
                for text in panel.update(tail.look()):
                    screen.say(panel.title, text)
            screen.refresh()
            draw_curves(runs, config.out)
            ended = list(map(_has_ended, summaries, panels))
            if all(a or b for a, b in zip(ended, gone, strict=True)):
                for panel, has_ended in zip(panels, ended, strict=True):
                    if not has_ended:
                        screen.say(panel.title, "nobody trains this run; its job goes on with it")
                return
            time.sleep(config.every_s)
    except KeyboardInterrupt:
        return
    finally:
        screen.close()


def _stage(run: RunFolder) -> str:
    return str(storage.read_json(storage.join(run.uri, "config.json"))["stage"])


def _has_ended(summary: Mapping[str, Any] | None, panel: RunPanel) -> bool:
    """Whether it came to something, and that is not what it had come to before it was continued."""
    return summary is not None and (panel.record is None or summary["step"] >= panel.record["step"])


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_flags(__doc__ or "", WatchConfig, argv, positional="runs")
    runs = [RunFolder(uri) for uri in config.runs]
    try:
        for run in runs:
            if not storage.exists(storage.join(run.uri, "config.json")):
                raise ConfigError(f"runs = {run.uri!r}: not a run folder, which has a config.json")
        if config.follow:
            follow(config, runs)
        if not draw_curves(runs, config.out):
            print("watch: nothing has been logged yet", file=sys.stderr)
            return 1
    except (ConfigError, OSError) as error:
        print(f"watch: {error}", file=sys.stderr)
        return 2
    print(config.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
