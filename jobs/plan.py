"""Plans a training run: `python jobs/plan.py --recipe paper --stage decoder --gpu h100 --gpus 256 --zero 3`.

Memory of a GPU by part at every ZeRO stage, the largest micro-batch that fits, time of a step, days, cost, the data rate that
this needs, and how it scales to 1,024 GPUs. What cannot fit is refused with what would (status 2). Needs no GPU and no Ray.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from unclip.config.base import ConfigError
from unclip.config.cli import parse_flags
from unclip.planning.assumptions import PlanConfig
from unclip.planning.curve import draw_curve
from unclip.planning.document import as_json
from unclip.planning.planner import Planner
from unclip.planning.tables import report


def main(argv: Sequence[str] | None = None) -> int:
    plan = parse_flags(__doc__ or "", PlanConfig, argv)
    try:
        planner = Planner(plan)
        chosen = planner.chosen()
        if plan.output == "json":
            print(json.dumps(as_json(planner, chosen), indent=1))
        else:
            print("\n".join(report(planner, chosen)))
        if plan.curve:
            draw_curve(planner, planner.curve(), plan.curve)
    except (ConfigError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
