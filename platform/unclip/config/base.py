"""`Config`: the one way settings are written, checked, overridden and stored."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticUndefined


class ConfigError(ValueError):
    """A setting is unknown, missing or out of range; the message names the field, the value and what is allowed."""


class Config(BaseModel):
    """Base of every configuration: immutable, strict about unknown fields, documented by the string below each field.

    Subclasses live beside the class they build and usually have a `build(...)` method.
    Constructing one with bad values raises `pydantic.ValidationError`; the class methods here raise `ConfigError`
    with one line for each bad field.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds the configuration from plain (JSON or YAML) values."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(cls, error))) from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a YAML or JSON file that holds every field without a default."""
        return cls.from_dict(read_settings(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of every field, defaults included."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def merged(self, changes: Mapping[str, Any]) -> Self:
        """This configuration with the nested `changes` laid over it and everything checked again."""
        return type(self).from_dict(_merge(self.to_dict(), changes))

    def override(self, assignments: Sequence[str]) -> Self:
        """This configuration after `a.b=value` assignments; values are YAML scalars or lists.

        Raises `ConfigError` where an assignment has no `=`, names an unknown field or a value that is not allowed.
        """
        changes: dict[str, Any] = {}
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals or not path:
                raise ConfigError(f"{assignment!r}: expected FIELD=VALUE, as in loop.max_steps=100")
            parts = path.strip().split(".")
            _set_path(changes, parts, _as_text(text) if self._holds_text(parts) else parse_value(text))
        return self.merged(changes)

    def _holds_text(self, path: list[str]) -> bool:
        """Whether the field at `path` is a string, perhaps none: then its value is not for YAML to interpret."""
        owner: Any = self
        for part in path[:-1]:
            owner = getattr(owner, part, None)
        field = type(owner).model_fields.get(path[-1]) if isinstance(owner, Config) else None
        if field is None:
            return False
        kinds = {field.annotation, *get_args(field.annotation)} - {type(None)}
        return kinds in ({str}, {str, str | None}) or bool(_choices(field.annotation))


def _as_text(text: str) -> str | None:
    return None if text == "null" else text


def parse_value(text: str) -> Any:
    """A command-line value as YAML reads it, but numbers like `1e-4` are numbers (YAML 1.1 wants `1.0e-4`)."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"value {text!r} is not valid YAML: {error}") from None


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; `ConfigError` where the file is missing or is no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"config file {str(path)!r} must hold a mapping of fields, not {type(settings).__name__}")
    return settings


def describe(config: Config, prefix: str = "") -> Iterator[str]:
    """One line a field, `path = value  (meaning)`, in the order of definition, nested configurations in place."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        path = f"{prefix}{name}"
        meaning = " ".join((field.description or "").split())
        if isinstance(value, Config):
            yield f"{path}:  {meaning}" if meaning else f"{path}:"
            yield from describe(value, prefix=f"{path}.")
            continue
        choices = _choices(field.annotation)
        notes = [meaning] if meaning else []
        notes += [f"one of {', '.join(choices)}"] if choices else []
        notes += ["required"] if field.default is PydanticUndefined and field.default_factory is None else []
        yield f"{path} = {json.dumps(config.to_dict()[name])}" + (f"  ({'; '.join(notes)})" if notes else "")


def _choices(annotation: Any) -> list[str]:
    """The strings of a `Literal[...]` annotation; empty for every other."""
    arguments = get_args(annotation)
    return [str(value) for value in arguments] if arguments and all(isinstance(a, str) for a in arguments) else []


def _set_path(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(path)}: {part!r} is set to a value and to fields of its own")
    tree[path[-1]] = value


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        same_kind = not (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and "kind" in value
            and value["kind"] != old.get("kind")
        )
        if isinstance(old, Mapping) and isinstance(value, Mapping) and same_kind:
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _explain(cls: type[Config], error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        path = ".".join(_walk(cls, location)[1]) or cls.__name__
        if problem["type"] == "extra_forbidden":
            names = list(_walk(cls, location[:-1])[0].model_fields)
            close = difflib.get_close_matches(location[-1], names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(names)}"
            yield f"{path}: unknown field; {hint}"
        elif problem["type"] == "missing":
            yield f"{path}: required, but not given"
        else:
            message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            shown = repr(problem["input"])
            is_whole = isinstance(problem["input"], Mapping | Config)
            yield f"{path}: {message}" if is_whole else f"{path} = {shown[:200]}: {message}"


def _walk(cls: type[Config], location: Sequence[str]) -> tuple[type[Config], list[str]]:
    """The configuration class at `location`, and the path as users write it: pydantic also names variants of unions."""
    path: list[str] = []
    variants: list[type[Config]] = []
    for part in location:
        tagged = [
            c for c in variants if "kind" in c.model_fields and part in get_args(c.model_fields["kind"].annotation)
        ]
        if tagged:
            cls, variants = tagged[0], []
            continue
        path.append(part)
        field = cls.model_fields.get(part)
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        variants = [c for c in candidates if isinstance(c, type) and issubclass(c, Config)]
        cls = variants[0] if variants else cls
    return cls, path
