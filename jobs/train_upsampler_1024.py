"""Trains the upsampler from 256 to 1024 pixels."""

from __future__ import annotations

import sys

from unclip.cluster.jobs import train_job
from unclip.recipes import RECIPES

if __name__ == "__main__":
    sys.exit(train_job(__doc__, RECIPES["upsampler_1024"]))
