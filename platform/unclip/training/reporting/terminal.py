"""Runs on the driver's screen: panels that change on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live

from unclip.training.config import TrainConfig
from unclip.training.reporting.panel import RunPanel, describe
from unclip.training.reporting.run_tail import News, Record

LINE_INTERVAL_S = 10.0


class Screen:
    """Shows panels on stderr; where that is no terminal, a line for each every 10 s."""

    def __init__(self, panels: Sequence[RunPanel], console: Console | None = None) -> None:
        self._panels = panels
        self._console = console or Console(stderr=True, soft_wrap=not Console(stderr=True).is_terminal)
        self._live = Live(Group(*panels), console=self._console, refresh_per_second=2)
        self._last_line = float("-inf")
        self._shown: dict[int, Record] = {}
        if self._console.is_terminal:
            self._live.start()

    def say(self, title: str, text: str) -> None:
        """A line of its own, at once."""
        self._console.print(f"{title}: {text}", style="yellow", markup=False, highlight=False)

    def refresh(self) -> None:
        """To be called when a panel has changed."""
        if not self._console.is_terminal and time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._lines()

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._lines()

    def _lines(self) -> None:
        for number, panel in enumerate(self._panels):
            record = panel.record
            if record is not None and record is not self._shown.get(number):
                self._shown[number] = record
                self._last_line = time.monotonic()
                text = f"{panel.title}: {100 * record['progress']:3.0f}% {describe(record)}"
                self._console.print(text, markup=False, highlight=False)


class TerminalView:
    """One run on the screen."""

    name = "the terminal view"

    def open(self, config: TrainConfig) -> None:
        self._panel = RunPanel(config.stage, config.run)
        self._screen = Screen([self._panel])

    def show(self, news: News) -> None:
        for text in self._panel.update(news):
            self._screen.say(self._panel.title, text)
        self._screen.refresh()

    def close(self) -> None:
        self._screen.close()
