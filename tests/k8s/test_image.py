"""The image's Dockerfile, and the steps of it that need no Docker; `make image-check` runs the long ones."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from tests.support.manifests import K8S, REPOSITORY

from unclip.cluster.checkup.run import PINS

IMAGE = K8S / "image"
INSTRUCTIONS = re.sub(r"\\\n", " ", (IMAGE / "Dockerfile").read_text()).splitlines()


def tracked() -> list[str]:
    """Files of the repository, those to be committed included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]


def ignored(file: str, patterns: list[str]) -> bool:
    """Docker's rule: the last pattern that matches a path or a folder above it; a pattern begins at the root, but for **/."""
    paths = [PurePosixPath(file), *PurePosixPath(file).parents][:-1]
    verdict = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        names = [path.name if wanted.startswith("**/") else str(path) for path in paths]
        if fnmatch.filter(names, wanted.removeprefix("**/")):
            verdict = not pattern.startswith("!")
    return verdict


@pytest.fixture(scope="module")
def sent() -> set[str]:
    """What the builder gets to see of them."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return {file for file in tracked() if not ignored(file, patterns)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment for processes in which `unclip` comes from the image's wheel and not from the repository."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # as the Dockerfile copies it: a build leaves its traces beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(
        REPOSITORY / "platform", source / "platform", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    subprocess.run([IMAGE / "build_wheel.sh", folder], cwd=source, env=environment, check=True)
    (wheel,) = folder.glob("*.whl")
    install = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, env=environment, check=True)
    return {**environment, "PYTHONPATH": str(folder / "site")}


def test_the_builder_sees_what_is_copied_and_nothing_that_is_not(sent: set[str]) -> None:
    copies = [line.split()[1:-1] for line in INSTRUCTIONS if line.startswith("COPY ") and "--from=" not in line]
    sources = {source.rstrip("/") for copy in copies for source in copy}
    copied = {file for file in sent if any(file == source or file.startswith(f"{source}/") for source in sources)}
    for source in sources:
        assert any(file == source or file.startswith(f"{source}/") for file in copied), source
    left = {file for file in sent - copied if not file.startswith("k8s/image/")}
    assert not left


def test_every_stage_comes_from_the_pinned_base() -> None:
    stages = [match.groups() for line in INSTRUCTIONS if (match := re.fullmatch(r"FROM (\S+)(?: AS (\S+))?", line))]
    names = {name for _, name in stages}
    assert [base for base, _ in stages if base not in names] == ["${BASE}", "runtime-${VARIANT}"]
    assert {"runtime-cpu", "runtime-cuda"} <= names
    assert "ARG BASE" in INSTRUCTIONS  # no default: a tag would be another image tomorrow


def test_preflight_finds_the_pins_beside_its_folder() -> None:
    """Without them it would compare the nodes' packages with nothing, and not say so."""
    last_stages = INSTRUCTIONS[INSTRUCTIONS.index("FROM runtime-${VARIANT} AS pod") :]
    assert [line for line in last_stages if PINS in line.split() and line.split()[-1] == "/opt/unclip/"]


def test_no_right_of_root_in_the_image() -> None:
    last_stages = INSTRUCTIONS[INSTRUCTIONS.index("FROM runtime-${VARIANT} AS pod") :]
    assert [line for line in last_stages if line.startswith("USER ")] == [
        "USER 1000:1000"
    ]  # a number: runAsNonRoot asks for it


def test_the_wheel_has_every_file_of_the_package(installed: dict[str, str]) -> None:
    site = Path(installed["PYTHONPATH"])
    files = {file.removeprefix("platform/") for file in tracked() if file.startswith("platform/unclip/")}
    assert {file for file in files if not (site / file).exists()} == set()


def test_commands_start_where_there_is_no_repository_and_one_that_does_not_fails_the_build(
    installed: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "jobs").mkdir()
    shutil.copy(REPOSITORY / "jobs" / "train_decoder.py", tmp_path / "jobs")
    (tmp_path / "jobs" / "broken.py").write_text("import unclip\nraise SystemExit(unclip.__file__)\n")
    smoke = subprocess.run([IMAGE / "smoke.sh", tmp_path], env=installed, capture_output=True, text=True, check=False)
    assert smoke.returncode != 0
    site = installed["PYTHONPATH"]
    assert smoke.stderr.splitlines() == ["python jobs/broken.py --help: status 1", f"{site}/unclip/__init__.py"]
    started = {line.removeprefix("starts: ") for line in smoke.stdout.splitlines()}
    assert {"ray start --help", "serve --help", "python jobs/train_decoder.py --help"} <= started


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="flags of x86-64")
def test_operators_are_compiled_for_other_machines_than_this_one() -> None:
    asked = [IMAGE / "portable_cxx", "-march=native", "-D__AVX512__", "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    assert "#define __AVX2__ 1" in macros
    assert "#define __AVX256__ 1" in macros
    assert "AVX512" not in macros


def test_an_unknown_variant_is_refused(tmp_path: Path) -> None:
    command = [IMAGE / "install_packages.sh", "gpu", tmp_path / "venv", ""]
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "VARIANT = 'gpu'" in refused.stderr
    assert not (tmp_path / "venv").exists()
