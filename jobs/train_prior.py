"""Trains a prior, diffusion or autoregressive (recipes ar_…): caption and CLIP text embedding to CLIP image embedding."""

from __future__ import annotations

import sys

from unclip.cluster.jobs import train_job
from unclip.recipes import RECIPES

if __name__ == "__main__":
    sys.exit(train_job(__doc__, RECIPES["prior"]))
