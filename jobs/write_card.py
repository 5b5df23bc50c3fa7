"""Writes the model card (README.md) of a bundle anew, with its licence and an evaluation where they are given."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import Field

from unclip.cluster.jobs import exit_status
from unclip.config.base import Config, ConfigError
from unclip.config.cli import parse_job
from unclip.pipelines.card import LICENCE_PATTERN, CardFacts, write_card
from unclip.utils import storage


class WriteCardConfig(Config):
    """A model card."""

    bundle: str = ""
    """The bundle, local or `s3://`; required."""
    licence: str | None = Field(default=None, pattern=LICENCE_PATTERN)
    """Licence of the weights, by the hub's identifier, as apache-2.0; null: as it was stated before."""
    evaluation: str | None = None
    """The result.json of an evaluation of the bundle's pictures; null: the one that was given before."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_job(__doc__ or "", {"default": WriteCardConfig}, argv)
    config: WriteCardConfig = arguments.config
    return exit_status("write_card", lambda: _write(config, dry_run=arguments.dry_run), goes_on="anew")


def _write(config: WriteCardConfig, *, dry_run: bool) -> None:
    if not config.bundle:
        raise ConfigError("bundle: required, but not given")
    evaluation = None if config.evaluation is None else _evaluation(config.evaluation)
    facts = CardFacts(licence=config.licence, evaluation=evaluation)
    print(write_card(config.bundle, facts, dry_run=dry_run))


def _evaluation(uri: str) -> dict[str, object]:
    try:
        found = storage.read_json(uri)
    except ValueError as error:
        raise ConfigError(f"evaluation = {uri!r}: is not JSON: {error}") from None
    if not isinstance(found, dict) or not {"metrics", "protocol"} <= found.keys():
        raise ConfigError(f"evaluation = {uri!r}: is no result.json of an evaluation")
    return found


if __name__ == "__main__":
    sys.exit(main())
