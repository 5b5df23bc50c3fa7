"""The code blocks of the documentation: all are read, and those that can run here are run, a page after the other."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jobs import plan
from PIL import Image
from tests.support.docs import REPOSITORY, Block, blocks, commands, pages, with_snippets
from tests.support.serving import running_app

from unclip.serving.config import ServeConfig

NOT_OURS = frozenset({"load_pipeline", "lpips"})
"""A file that jobs/convert.py writes into its folder, and a package that users bring themselves."""
SERVER = ("http://127.0.0.1:8000", "http://localhost:8000")


@dataclass(frozen=True)
class Story:
    """A page whose Python blocks run one after the other in one namespace.

    Args:
        replaced: what stands for an address of the page.
        before: what a block takes for granted, as Python.
        files: pictures that it reads.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    before: str = ""
    files: tuple[str, ...] = ()


RUN = {
    "README.md": Story({"runs/demo-12/bundle": "{bundle}"}),
    "docs/api.md": Story(
        before='key = "none"',
        files=("photo.png", "mask.png", "one.png", "two.png"),
    ),
    "docs/engine.md": Story({"s3://bucket/bundle": "{bundle}", '"cuda"': '"cpu"'}),
    "docs/keys_and_policy.md": Story(files=("gun-1.png", "gun-2.png", "umbrella.png")),
    "docs/manipulations.md": Story(
        {'"BUNDLE"': '"{bundle}", "cpu"'},
        before="def show(stage, rows, predicted): assert predicted.isfinite().all()",
        files=("cat.png", "dog.png"),
    ),
}
"""Of the other pages Python is compiled and its imports are resolved: they show parts of files that have tests of their own,
need weights that cannot be had here, or a cluster (batches.md: tests/cluster)."""


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_python_compiles_and_imports_what_is_there(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            tree = ast.parse(with_snippets(block.text), filename=str(block))
            for name in _imported(tree):
                assert _exists(name), f"{block}: there is no {name}"


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _exists(name: str) -> bool:
    """Whether a module, or an attribute of one, has this dotted name."""
    module, _, attribute = name.rpartition(".")
    if name.split(".")[0] in NOT_OURS:
        return True
    try:
        importlib.import_module(name)
    except ImportError:
        return bool(module) and _exists(module) and hasattr(importlib.import_module(module), attribute)
    return True


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_yaml_and_json_are_read(page: Path) -> None:
    for block in blocks(page):
        try:
            if block.language == "yaml":
                list(yaml.safe_load_all(block.text))
            elif block.language == "json":
                [json.loads(line) for line in block.text.splitlines()]
        except (yaml.YAMLError, json.JSONDecodeError) as error:
            pytest.fail(f"{block}: {error}")


@pytest.fixture(scope="module")
def server(bundle: str) -> Iterator[str]:
    """The address of an images API without keys."""
    with running_app(ServeConfig(bundle=bundle)) as running:
        yield running.url


@pytest.mark.parametrize("page", RUN)
def test_python_runs(page: str, bundle: str, server: str, tmp_path: Path) -> None:
    story = RUN[page]
    _write_pictures(tmp_path, story.files)
    namespace: dict[str, Any] = {}
    exec(story.before, namespace)
    ran = 0
    with chdir(tmp_path):
        for block in blocks(REPOSITORY / page):
            if block.language == "python":
                text = block.text
                for old, new in story.replaced.items():
                    text = text.replace(old, new.format(bundle=bundle))
                for old in SERVER:
                    text = text.replace(old, server)
                exec(compile(text, str(block), "exec"), namespace)
                ran += 1
    assert ran > 0


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_curl_is_answered(page: str, server: str, tmp_path: Path) -> None:
    """The API takes what the pages send it; pictures by address need a store, which this server has none of."""
    _write_pictures(tmp_path, ("photo.png", "mask.png", "one.png", "two.png"))
    ran = 0
    for block in blocks(REPOSITORY / page):
        if block.language in ("sh", "bash") and "curl" in block.text:
            lines = block.text.replace("\\\n", " ").splitlines()
            for line in (line for line in lines if line.startswith("curl") and "/v1/pictures/" not in line):
                command = line.replace(SERVER[0], server).replace("curl", "curl --fail-with-body -sS --max-time 60", 1)
                done = subprocess.run(
                    ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "KEY": "none"}, capture_output=True
                )
                assert done.returncode == 0, f"{block}: {line}\n{done.stdout.decode()}{done.stderr.decode()}"
                ran += 1
    assert ran > 0


def _write_pictures(folder: Path, names: tuple[str, ...]) -> None:
    """Each of its own; a mask has a transparent half."""
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        pixels[:, :4, 3] = 0 if name == "mask.png" else 255
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(folder / name)


CONSOLE = [block for page in pages() for block in blocks(page) if block.language == "console"]


@pytest.mark.parametrize("block", [b for b in CONSOLE if "--recipe paper --stage decoder" not in b.text], ids=str)
def test_output_is_what_the_command_prints(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them are plans; the paper's decoder is left out, as it takes the longest. What is shown may end early."""
    [command] = commands(block)
    assert command.words[:2] == ("python", "jobs/plan.py")
    assert plan.main(command.words[2:]) == 0
    assert capsys.readouterr().out.startswith(block.text.partition("\n")[2])
