"""Which moments of a picture's way are its partial images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from unclip.pipelines.stages import StageName
from unclip.serving.groups import Shown


class Previews:
    """`count` moments, evenly over the stages that make pictures, each of which counts the same.

    Args:
        stages: these stages, in their order.
    """

    def __init__(self, count: int, stages: Sequence[StageName]) -> None:
        self._wanted: dict[StageName, list[float]] = {stage: [] for stage in stages}
        for index in range(1, count + 1):
            place = index * len(stages) / (count + 1)
            stage = math.ceil(place) - 1
            self._wanted[stages[stage]].append(place - stage)

    @property
    def shares(self) -> list[float]:
        """Shares of the way through a stage, ascending, at which one of the stages is to be shown."""
        return sorted({share for shares in self._wanted.values() for share in shares})

    def takes(self, shown: Shown) -> bool:
        """Whether this is the next partial image; each is taken once."""
        waiting = self._wanted.get(shown.stage, [])
        reached = [
            share for share in waiting if max(1, round(share * shown.total)) <= shown.steps
        ]  # as groups show them
        if shown.picture is None or not reached:
            return False
        del waiting[: len(reached)]
        return True
