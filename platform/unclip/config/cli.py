"""The command lines of jobs: those with recipes have `--recipe`, `--config`, `--set`, `--dry-run`; small ones a flag a field."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic.fields import FieldInfo

from unclip.config.base import Config, ConfigError, describe, parse_value, read_settings

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
        _refuse(parser, error)
    return JobArguments(config=config, dry_run=arguments.dry_run)


def parse_flags(
    description: str, config_class: type[C], argv: Sequence[str] | None = None, *, positional: str | None = None
) -> C:
    """Reads a flat configuration from `--field value` arguments, for jobs that only look at things.

    A tuple takes one value or several, a bool is `--field` or `--no-field`, `_` in a name becomes `-`; the field
    named `positional` is given without a flag. What a field means comes from its documentation. Bad arguments end the
    process with status 2 and one line for each problem.
    """
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, field in config_class.model_fields.items():
        _add_field(parser, name, field, is_positional=name == positional)
    try:
        given = vars(parser.parse_args(argv))
        return config_class.from_dict({name: _value(config_class.model_fields[name], given[name]) for name in given})
    except ConfigError as error:
        _refuse(parser, error)


def _add_field(parser: argparse.ArgumentParser, name: str, field: FieldInfo, *, is_positional: bool) -> None:
    is_list = get_origin(field.annotation) is tuple
    text = " ".join((field.description or "").split())
    if not field.is_required() and field.default not in (None, "", ()):
        text += f" (default: {' '.join(map(str, field.default)) if is_list else field.default})"
    text = text.replace("%", "%%")
    if is_positional:
        nargs = ("+" if is_list else None) if field.is_required() else ("*" if is_list else "?")
        parser.add_argument(name, metavar=name.upper(), nargs=nargs, help=text)
        return
    flag = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
    else:
        choices = "{" + ",".join(map(str, get_args(field.annotation))) + "}" if _is_choice(field) else name.upper()
        parser.add_argument(flag, dest=name, metavar=choices, nargs="+" if is_list else None, help=text)


def _is_choice(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is Literal


def _value(field: FieldInfo, given: Any) -> Any:
    """What was typed, as the field's type reads it: text stays text, everything else is YAML."""
    if isinstance(given, bool) or str in (field.annotation, *get_args(field.annotation)):
        return given
    return [parse_value(text) for text in given] if isinstance(given, list) else parse_value(given)


def _refuse(parser: argparse.ArgumentParser, error: ConfigError) -> NoReturn:
    print(f"{parser.prog}: {error}", file=sys.stderr)
    raise SystemExit(2) from None


def _resolve(recipes: Mapping[str, Callable[[], C]], name: str, file: str | None, assignments: Sequence[str]) -> C:
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"recipe {name!r}: unknown; known are {', '.join(recipes)}{hint}")
    config = recipes[name]()
    if file is not None:
        config = config.merged(read_settings(file))
    return config.override(assignments) if assignments else config
