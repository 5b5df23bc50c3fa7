"""Prints the manifests on stdin, and, as pods, the pod templates inside of custom resources, which scanners do not know."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import yaml


def pods(name: str, part: Any) -> Iterator[dict[str, Any]]:
    """Whatever has containers below `part`; its name is the way to it."""
    if isinstance(part, dict) and "containers" in part.get("spec", {}):
        metadata = {**part.get("metadata", {}), "name": name.lower(), "namespace": "unclip"}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": part["spec"]}
    elif isinstance(part, dict | list):
        entries = part.items() if isinstance(part, dict) else enumerate(part)
        for key, entry in entries:
            yield from pods(f"{name}.{key}", entry)


def main() -> None:
    objects = [manifest for manifest in yaml.safe_load_all(sys.stdin) if manifest]
    custom = [manifest for manifest in objects if manifest["apiVersion"].startswith("ray.io/")]
    found = [
        pod
        for manifest in custom
        for pod in pods(f"{manifest['kind']}.{manifest['metadata']['name']}", manifest["spec"])
    ]
    yaml.safe_dump_all([*objects, *found], sys.stdout)


if __name__ == "__main__":
    main()
