"""What each program that the documentation names would make of its command line, without doing it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from tests.support.docs import REPOSITORY

ELSEWHERE = {
    "cat": "reads a file of the user's",
    "cd": "changes to the user's copy",
    "docker": "no Docker where tests run; its files are checked",
    "export": "sets the user's environment",
    "git": "makes the user's copy",
    "helm": "no Kubernetes where tests run",
    "kind": "no Kubernetes where tests run",
    "pip": "installs",
    "prometheus": "runs until it is stopped; its files are checked",
    "source": "changes the user's shell",
    "ulimit": "sets the limits of the user's shell",
    "uv": "installs",
}
"""Programs whose arguments are not ours to parse, and why."""


class Refused(Exception):
    """A command that would not do; the message says why."""


class _Parsed(BaseException):
    """Ends a script when its command line has been read. No `Exception`, which a script may catch."""


def check(words: Sequence[str]) -> None:
    """Raises `Refused` where a command's arguments are not what its program takes, or a file that it names is not there."""
    program, *arguments = _without_assignments(words)
    name = Path(program).name
    if name in _CHECKS:
        _CHECKS[name](arguments)
    elif name in ELSEWHERE:
        _check_files(arguments)
    else:
        raise Refused(f"nobody knows how to check {name!r}: add it to tests/support/command_lines.py")


def _without_assignments(words: Sequence[str]) -> Sequence[str]:
    first = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return words[first:] or ("export",)


def _python(arguments: Sequence[str]) -> None:
    if not arguments:
        raise Refused("python without a script")
    first, *rest = arguments
    if first == "-c":
        compile(rest[0], "-c", "exec")
    elif first == "-m":
        _check_module(*rest)
    else:
        parse_script(first, rest)


def parse_script(script: str, arguments: Sequence[str]) -> Any:
    """The configuration that a script of jobs/ or examples/ reads from its arguments; `Refused` with what it says of them.

    Runs the script up to the point where it has read its command line, by the functions that every script uses.
    """
    from unclip.cluster import jobs
    from unclip.config import cli
    from unclip.generation import jobs as generation_jobs

    path = REPOSITORY / script
    if not path.is_file():
        raise Refused(f"there is no {script}")
    read: list[Any] = []

    def ending(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_end(*args: Any, **options: Any) -> Any:
            found = parse(*args, **options)
            read.append(getattr(found, "config", found))
            raise _Parsed

        return parse_and_end

    with pytest.MonkeyPatch.context() as patch:
        for module in (cli, jobs, generation_jobs):  # where scripts have it from
            for name in ("parse_job", "parse_flags"):
                if hasattr(module, name):
                    patch.setattr(module, name, ending(getattr(module, name)))
        patch.setattr(sys, "argv", [script, *arguments])
        messages = patch_stderr(patch)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _Parsed:
            return read[-1]
        except SystemExit as error:
            if error.code in (0, None):  # --help
                return None
            raise Refused("".join(messages).strip() or f"status {error.code}") from None
    raise Refused(f"{script} has not read its command line by parse_job or parse_flags")


def patch_stderr(patch: pytest.MonkeyPatch) -> list[str]:
    """What is written to stderr from now on, until `patch` ends."""
    written: list[str] = []

    class Stream:
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

        def flush(self) -> None:
            pass

    patch.setattr(sys, "stderr", Stream())
    return written


def _check_module(module: str, *arguments: str) -> None:
    """A module that can be run, and that knows the flags."""
    if module == "venv":
        return
    found = importlib.util.find_spec(module)
    if found is not None and found.submodule_search_locations:
        found = importlib.util.find_spec(f"{module}.__main__")
    if found is None or found.origin is None:
        raise Refused(f"there is no module {module}")
    source = Path(found.origin).read_text(encoding="utf-8")
    for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
        field = flag.removeprefix("--").replace("-", "_")
        if module.split(".")[0] == "benchmarks" and flag not in source and not re.search(rf"\b{field}\b", source):
            raise Refused(f"{module} has no flag {flag}")


def _ray(arguments: Sequence[str]) -> None:
    from ray.dashboard.modules.job.cli import submit
    from ray.scripts.scripts import start

    if arguments[:2] == ["job", "submit"]:
        values = _click(submit, arguments[2:])
        if values["runtime_env"] is not None:
            _existing(values["runtime_env"])
        check(values["entrypoint"])
    elif arguments[:1] == ["start"]:
        _click(start, arguments[1:])


def _serve(arguments: Sequence[str]) -> None:
    from ray.serve import scripts

    from unclip.cluster.serve.application import read_args
    from unclip.config.base import ConfigError

    if arguments[0] == "run":
        values = _click(scripts.run, arguments[1:])
        module, _, function = values["config_or_import_path"].partition(":")
        if not hasattr(importlib.import_module(module), function):
            raise Refused(f"{module} has no {function}")
        try:
            read_args(dict(argument.split("=", 1) for argument in values["arguments"]))
        except ConfigError as error:
            raise Refused(str(error)) from None
    elif arguments[0] == "deploy":
        _click(
            scripts.deploy, [str(REPOSITORY / "pyproject.toml") if a.endswith(".yaml") else a for a in arguments[1:]]
        )
    else:
        raise Refused(f"serve {arguments[0]}: unknown")


def _click(command: click.Command, arguments: Sequence[str]) -> dict[str, Any]:
    try:
        return dict(command.make_context(str(command.name), list(arguments)).params)
    except click.ClickException as error:
        raise Refused(error.format_message()) from None


def _kubectl(arguments: Sequence[str]) -> None:
    """Folders and files that are applied exist, and so does the job that a label or a name selects."""
    for flag, value in pairwise(arguments):
        if flag in ("-f", "-k") and "apply" in arguments and "NAME" not in value:
            _existing(value)
            if flag == "-k" and not (REPOSITORY / value / "kustomization.yaml").is_file():
                raise Refused(f"{value} has no kustomization.yaml")
        if flag == "-l" and value.startswith("unclip/job="):
            _known_job(value.partition("=")[2])
    for word in arguments:
        if word.startswith("job/"):
            _known_job(word.removeprefix("job/"))


def _known_job(name: str) -> None:
    files = [*(REPOSITORY / "k8s").rglob("*.yaml")]
    if not any(re.search(rf"\bname: {re.escape(name)}\b(?!-)", file.read_text(encoding="utf-8")) for file in files):
        raise Refused(f"no manifest is named {name}")


def _make(arguments: Sequence[str]) -> None:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        name, equals, _ = word.partition("=")
        if equals and not re.search(rf"^{re.escape(name)} *[:?]?=|\$\({re.escape(name)}\)", text, re.M):
            raise Refused(f"the Makefile does not use {name}")
        if not equals and not re.search(rf"^{re.escape(name)}:", text, re.M):
            raise Refused(f"the Makefile has no target {name}")


def _curl(arguments: Sequence[str]) -> None:
    """The address is one of the API's, and a JSON body is JSON."""
    addresses = [word for word in arguments if re.match(r"https?://(127\.0\.0\.1|localhost):8000|\$URL", word)]
    if not addresses:
        raise Refused("no address of the API")
    path = re.sub(r"^(https?://[^/]+|\$URL)", "", addresses[0])
    if not any(pattern.fullmatch(path) for pattern in _routes()):
        raise Refused(f"the API has nothing at {path}")
    for flag, value in pairwise(arguments):
        if flag == "-d" and not value.startswith("@"):
            try:
                json.loads(value)
            except ValueError as error:
                raise Refused(f"the body is no JSON: {error}") from None


@cache
def _routes() -> list[re.Pattern[str]]:
    """A pattern for the path of every route of the images API."""
    from unclip.serving.api.routes import batches, embeddings, health, images, latents, models, pictures
    from unclip.serving.config import ServeConfig

    owner: Any = SimpleNamespace(config=ServeConfig(bundle="BUNDLE"))  # all that routes are made of
    routers: list[APIRouter] = [
        images.images_router(owner),
        latents.latents_router(owner),
        embeddings.embeddings_router(owner),
        models.models_router(owner),
        pictures.pictures_router(owner),
        health.health_router(owner),
        batches.batches_router(owner),
    ]
    paths = [route.path for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return [re.compile(re.sub(r"\{[^}]+\}", "[^/]+", path)) for path in paths]


def _check_files(arguments: Sequence[str]) -> None:
    """Files of the repository that other programs are told to read."""
    for flag, value in pairwise(arguments):
        if flag == "--file":
            _existing(value)
    for word in arguments:
        if word.startswith("--config.file="):
            _existing(word.partition("=")[2])


def _existing(path: str) -> None:
    if not (REPOSITORY / path).exists():
        raise Refused(f"there is no {path}")


_CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "curl": _curl,
    "kubectl": _kubectl,
    "make": _make,
    "python": _python,
    "python3": _python,
    "ray": _ray,
    "serve": _serve,
}
