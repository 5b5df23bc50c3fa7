"""The command line that every job has: `--recipe`, `--config`, `--set`, `--dry-run`, `--help`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from unclip.config.base import Config, ConfigError, describe, read_settings

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class JobArguments(Generic[C]):
    """What a job was asked for."""

    config: C
    dry_run: bool


class _HelpWithFields(argparse.Action):
    """Prints the usual help, then every field of the chosen recipe with its default and meaning."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, recipes: Mapping[str, Callable[[], Config]]
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this and every field of the recipe")
        self.recipes = recipes

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        name = namespace.recipe or next(iter(self.recipes))
        print(parser.format_help())
        print(f"fields for --set (values of recipe {name!r}):")
        if name in self.recipes:
            print("\n".join(f"  {line}" for line in describe(self.recipes[name]())))
        parser.exit()


def parse_job(
    description: str, recipes: Mapping[str, Callable[[], C]], argv: Sequence[str] | None = None
) -> JobArguments[C]:
    """Reads a job's arguments: a recipe's configuration, `--config FILE` laid over it, then each `--set`.

    The first recipe is the default. Bad arguments end the process with status 2 and one line for each problem.
    """
    parser = argparse.ArgumentParser(description=description, add_help=False)
    default = next(iter(recipes))
    parser.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(recipes)} (default: {default})")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with fields to change")
    parser.add_argument(
        "--set", metavar="A.B=VALUE", action="append", default=[], dest="assignments", help="change a field"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, claim and write nothing")
    parser.add_argument("-h", "--help", action=_HelpWithFields, recipes=recipes)
    arguments = parser.parse_args(argv)
    try:
        config = _resolve(recipes, arguments.recipe or default, arguments.config, arguments.assignments)
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return JobArguments(config=config, dry_run=arguments.dry_run)


def _resolve(recipes: Mapping[str, Callable[[], C]], name: str, file: str | None, assignments: Sequence[str]) -> C:
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"recipe {name!r}: unknown; known are {', '.join(recipes)}{hint}")
    config = recipes[name]()
    if file is not None:
        config = config.merged(read_settings(file))
    return config.override(assignments) if assignments else config
