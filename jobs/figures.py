"""The paper's kinds of figures from any bundle: `python jobs/figures.py BUNDLE --out figures`.

Samples, variations, interpolations, text diffs, probing and the ablation of the prior, each with a contact sheet; what the
bundle cannot do is left out with a line that says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config.cli import parse_flags
from unclip.generation.figures import Figures, FiguresConfig
from unclip.generation.jobs import REFUSALS, REFUSED


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_flags(__doc__ or "", FiguresConfig, argv, positional="bundle")
    try:
        for line in Figures.prepare(config).run():
            print(line, flush=True)
    except REFUSALS as error:
        print(f"figures: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
