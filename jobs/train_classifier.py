"""Trains the noised classifier, which can guide the decoder towards a class: any column of the records."""

from __future__ import annotations

import sys

from unclip.cluster.jobs import train_job
from unclip.recipes import RECIPES

if __name__ == "__main__":
    sys.exit(train_job(__doc__, RECIPES["classifier"]))
