"""Every folder that is applied, what it renders to, and the definitions of custom resources."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.support.crds import Crds
from tests.support.manifests import REPOSITORY, Object, build, leaves


@pytest.fixture(params=leaves())
def leaf(request: pytest.FixtureRequest) -> str:
    """A folder that is applied, as `overlays/gpu-h100/jobs`."""
    return str(request.param)


@pytest.fixture
def objects(leaf: str) -> tuple[Object, ...]:
    """Its objects."""
    return build(leaf)


@pytest.fixture
def everything() -> Mapping[str, tuple[Object, ...]]:
    """The objects of every folder that is applied."""
    return {leaf: build(leaf) for leaf in leaves()}


@pytest.fixture(scope="session")
def crds(request: pytest.FixtureRequest) -> Crds:
    """From the folders given by `--crds` or the variable KUBERAY_CRDS, or those beside this checkout."""
    given = request.config.getoption("--crds") or os.environ.get("KUBERAY_CRDS", "").split(os.pathsep)
    beside = REPOSITORY.parent / "shared" / "kuberay-crds"
    folders = [Path(folder) for folder in given if folder] or [beside]
    found = Crds(folders)
    if not found.know("ray.io"):
        pytest.skip(f"no definitions of KubeRay in {', '.join(map(str, folders))}: give --crds FOLDER or KUBERAY_CRDS")
    return found
