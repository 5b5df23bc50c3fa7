"""Measures the analytic variance of a bundle's diffusion prior and writes it into the bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config.base import ConfigError
from unclip.config.cli import parse_job
from unclip.data.manifest import DataError
from unclip.pipelines.bundle import BundleError
from unclip.training.analytic_variance import FitAnalyticVarianceConfig, fit_analytic_variance


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": FitAnalyticVarianceConfig}, argv)
    try:
        found = fit_analytic_variance(arguments.config, dry_run=arguments.dry_run)
    except (ConfigError, DataError, BundleError, OSError) as error:
        print(f"fit_analytic_variance: {error}", file=sys.stderr)
        return 2
    bundle = arguments.config.bundle
    if found is None:
        print(f"the prior of {bundle} would be measured")
        return 0
    print(f"the prior of {bundle} samples with analytic variance; mean square of its data: {found.bound:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
