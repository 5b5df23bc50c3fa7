"""How many processes a deployment has: by the denoising steps that wait and run in it, not by its requests.

Serve takes this module to its controller by value, where unclip may not be installed: it imports nothing of unclip.
"""

from __future__ import annotations

import math
from typing import Any

QUEUED_STEPS = "queued_steps"
"""What replicas report by `record_autoscaling_stats`."""


class ByQueuedSteps:
    """As many processes as have `queued_steps` denoising steps each; Serve keeps to its bounds, and waits its delays."""

    def __init__(self, queued_steps: int) -> None:
        self._each = queued_steps

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """What `ray.serve.config.AutoscalingContext` calls for, and nothing to remember; without a report, no change."""
        reports = (context.aggregated_metrics or {}).get(QUEUED_STEPS)
        if not reports:
            return context.target_num_replicas, {}
        return max(1, math.ceil(sum(reports.values()) / self._each)), {}
