"""Feeds every configured view of a run from its folder while the run trains."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from unclip.training.config import TrainConfig
from unclip.training.reporting.run_tail import News, RunTail
from unclip.training.reporting.terminal import TerminalView
from unclip.training.reporting.view import View
from unclip.training.run_folder import RunFolder
from unclip.utils import storage

LOCAL_POLL_S, REMOTE_POLL_S = 0.5, 5.0
"""Seconds between two looks into a run folder on disk and on object storage."""
CLOSE_LIMIT_S = 60.0
"""Longest time that views have to show what is left when the run is over."""


class Reporter:
    """Context manager: shows the run while the block runs, and all that is left at its end.

    One thread reads the run folder, each view shows in one of its own: neither a view that fails, which is switched off
    with one warning, nor one that waits for a network delays another or the run. A store that does not answer delays
    what is shown.

    Args:
        config: the run; `config.reporting` says which views there are beside the terminal.
        extra_views: more of them, not opened yet.
    """

    def __init__(self, config: TrainConfig, extra_views: Sequence[View] = ()) -> None:
        run = RunFolder(config.run)
        self._tail = RunTail(run)
        self._poll_s = LOCAL_POLL_S if storage.is_local(run.uri) else REMOTE_POLL_S
        self._feeds = [_Feed(view, config) for view in (*_configured_views(config), *extra_views)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reporter", daemon=True)

    def __enter__(self) -> Self:
        for feed in self._feeds:
            feed.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + CLOSE_LIMIT_S
        self._stop.set()
        self._thread.join(CLOSE_LIMIT_S)
        for feed in self._feeds:
            feed.finish()
        for feed in self._feeds:
            feed.join(max(0.0, deadline - time.monotonic()))

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_s):
            self._look()
        self._look()

    def _look(self) -> None:
        try:
            news = self._tail.look()
        except OSError:  # the next look shows what this one would have
            return
        if news:
            for feed in self._feeds:
                feed.put(news)


def _configured_views(config: TrainConfig) -> list[View]:
    """Libraries are imported for the views that use them, where they are used."""
    views: list[View] = [TerminalView()]
    if config.reporting.tensorboard:
        from unclip.training.reporting.tensorboard import TensorBoardView

        views.append(TensorBoardView())
    if config.reporting.wandb is not None:
        from unclip.training.reporting.wandb import WandbView

        views.append(WandbView(config.reporting.wandb))
    if config.reporting.mlflow is not None:
        from unclip.training.reporting.mlflow import MlflowView

        views.append(MlflowView(config.reporting.mlflow))
    return views


class _Feed:
    """One view and its thread."""

    def __init__(self, view: View, config: TrainConfig) -> None:
        self._view = view
        self._config = config
        self._queue: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        self._is_on = True
        self._thread = threading.Thread(target=self._guarded, name=f"view {view.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, news: News) -> None:
        if self._is_on:
            self._queue.put(news)

    def finish(self) -> None:
        """Nothing more will come."""
        self._queue.put(None)

    def join(self, limit_s: float) -> None:
        """Waits until the view is closed, at most so long."""
        self._thread.join(limit_s)
        if self._thread.is_alive():
            warnings.warn(f"{self._view.name} was not done {CLOSE_LIMIT_S:.0f} s after the run", stacklevel=2)

    def _guarded(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._is_on = False
            text = f"{self._view.name} is switched off: {type(error).__name__}: {error}"
            warnings.warn(f"{text}. The run goes on; its folder holds everything", stacklevel=2)

    def _work(self) -> None:
        self._view.open(self._config)
        try:
            while (news := self._queue.get()) is not None:
                self._view.show(news)
        finally:
            self._view.close()
