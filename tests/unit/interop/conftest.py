"""One small folder of Karlo's format, and the bundle that is made of it, for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.karlo import make_karlo

from unclip.interop.convert import ConvertConfig, run_convert


@pytest.fixture(scope="session")
def karlo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_karlo(tmp_path_factory.mktemp("karlo"))


@pytest.fixture(scope="session")
def karlo_bundle(karlo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("karlo-bundle") / "bundle"
    list(run_convert(ConvertConfig(source=str(karlo), kind="diffusers", out=str(out))))
    return out
