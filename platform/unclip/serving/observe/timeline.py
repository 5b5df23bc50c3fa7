"""When a picture went through the stages of an engine: as meters, and as spans of its trace."""

from __future__ import annotations

import time
from collections.abc import Callable

from unclip.generation.engine.request import Result, Update
from unclip.pipelines.stages import StageName
from unclip.serving.observe.meters import Meters
from unclip.serving.observe.traces import record


class Timeline:
    """Notes a request's steps as its `Request.watch`; make it just before the request is submitted.

    Args:
        watch: is told of all steps too.
    """

    def __init__(self, watch: Callable[[Update], None] | None = None) -> None:
        self._watch = watch
        self._submitted = time.time()
        self._ended: dict[StageName, float] = {}

    def __call__(self, update: Update) -> None:
        self._ended[update.stage] = time.time()
        if self._watch is not None:
            self._watch(update)

    def finish(self, result: Result, meters: Meters, group: str) -> None:
        """Observes how long the picture waited for its first step and how long it was in each stage; a span for each.

        A stage begins where the one before it ended: waiting for a slot between them is the later one's.
        """
        began, until = self._submitted, self._submitted + result.queue_seconds
        meters.observe("unclip_serve_queue_seconds", result.queue_seconds, group=group)
        record("queue", began=began, ended=until, group=group)
        for stage, ended in self._ended.items():
            began, until = until, max(until, ended)
            meters.observe("unclip_serve_stage_seconds", until - began, group=group, stage=stage)
            record("stage", began=began, ended=until, group=group, stage=stage)
