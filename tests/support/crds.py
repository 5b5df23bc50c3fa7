"""Custom resources checked against their definitions as strictly as `kubectl apply --validate=strict` does, without a cluster."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import celpy
from celpy.adapter import json_to_cel
from celpy.celparser import CELParseError
from celpy.evaluation import CELEvalError
from jsonschema import Draft4Validator, FormatChecker, ValidationError, validators
from tests.support.manifests import Object, load

Problems = Iterator[ValidationError]

_FORMATS = FormatChecker(formats=())
_FORMATS.checks("date-time", raises=ValueError)(
    lambda value: not isinstance(value, str) or bool(datetime.fromisoformat(value))
)
for _bits in (32, 64):
    _FORMATS.checks(f"int{_bits}")(
        lambda value, bits=_bits: not isinstance(value, int) or -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)
    )


class Crds:
    """The CustomResourceDefinitions in some folders."""

    def __init__(self, folders: Iterable[Path]) -> None:
        files = [file for folder in folders for file in sorted(folder.rglob("*.yaml"))]
        found = [crd for file in files for crd in load(file.read_text()) if crd["kind"] == "CustomResourceDefinition"]
        self._schemas = {
            (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]): version["schema"]
            for crd in found
            for version in crd["spec"]["versions"]
            if version["served"]
        }
        self._groups = {crd["spec"]["group"] for crd in found}

    def know(self, group: str) -> bool:
        """Whether anything of an API group is defined."""
        return group in self._groups

    def problems(self, found: Object) -> list[str]:
        """What the API server would refuse or warn of, each with its place."""
        key = (found["apiVersion"], found["kind"])
        if key not in self._schemas:
            return [f"no {key[1]} in {key[0]}"]
        return [f"{error.json_path}: {error.message}" for error in self._validator(key).iter_errors(found)]

    @functools.cache  # noqa: B019 - lives as long as the session
    def _validator(self, key: tuple[str, str]) -> Any:
        schema = self._schemas[key]["openAPIV3Schema"]
        anything = {"x-kubernetes-preserve-unknown-fields": True}
        properties = schema["properties"] | {"metadata": anything}  # checked as any other object's metadata
        return _Strict(schema | {"properties": properties}, format_checker=_FORMATS)


def _type(validator: Any, wanted: str, instance: Any, schema: Mapping[str, Any]) -> Problems:
    if instance is None and schema.get("nullable"):
        return
    if not validator.is_type(instance, wanted):
        yield ValidationError(f"{instance!r} is not of type {wanted!r}")
        return
    if wanted == "object" and "additionalProperties" not in schema and not _keeps_unknown(schema):
        for key in sorted(set(instance) - set(schema.get("properties", {}))):
            yield ValidationError(f"unknown field {key!r}")


def _keeps_unknown(schema: Mapping[str, Any]) -> bool:
    return bool(schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource"))


def _required(validator: Any, names: list[str], instance: Any, schema: Mapping[str, Any]) -> Problems:
    """Fields with a default are filled in before anything is checked."""
    fields = schema.get("properties", {})
    for name in names:
        if name not in instance and "default" not in fields.get(name, {}):
            yield ValidationError(f"{name!r} is a required property")


def _int_or_string(validator: Any, wanted: bool, instance: Any, schema: Mapping[str, Any]) -> Problems:
    if wanted and (isinstance(instance, bool) or not isinstance(instance, int | str)):
        yield ValidationError(f"{instance!r} is neither an integer nor a string")


def _list_keys(validator: Any, keys: list[str], instance: Any, schema: Mapping[str, Any]) -> Problems:
    """Items of a list that is a map have to differ in its keys; a key that is left out has its default."""
    fields = schema["items"].get("properties", {})
    entries = [tuple(item.get(key, fields[key].get("default")) for key in keys) for item in instance]
    for entry in sorted({entry for entry in entries if entries.count(entry) > 1}, key=str):
        yield ValidationError(f"two items with {dict(zip(keys, entry, strict=True))}")


def _list_type(validator: Any, kind: str, instance: Any, schema: Mapping[str, Any]) -> Problems:
    if kind == "set" and any(instance.count(item) > 1 for item in instance):
        yield ValidationError(f"items of {instance!r} are not unique")


def _cel(validator: Any, rules: list[Mapping[str, Any]], instance: Any, schema: Mapping[str, Any]) -> Problems:
    """Rules about one state of an object; those about a change of it have no meaning here."""
    for rule in rules:
        if "oldSelf" in rule["rule"]:
            continue
        try:
            holds = _program(rule["rule"]).evaluate({"self": json_to_cel(instance)})
        except (CELEvalError, CELParseError) as error:
            warnings.warn(f"a rule is not evaluated: {rule['rule']!r}: {error}", stacklevel=2)
            continue
        if not holds:
            yield ValidationError(rule.get("message", rule["rule"]))


@functools.cache
def _program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


_Strict = validators.extend(
    Draft4Validator,
    {
        "required": _required,
        "type": _type,
        "x-kubernetes-int-or-string": _int_or_string,
        "x-kubernetes-list-map-keys": _list_keys,
        "x-kubernetes-list-type": _list_type,
        "x-kubernetes-validations": _cel,
    },
)
