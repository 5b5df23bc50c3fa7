"""Real OpenMoji records, rendered once a session, and a training stream without Ray."""

from __future__ import annotations

import pytest

from unclip.data.openmoji import PrepareConfig, prepare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--crds", action="append", help="folder with CustomResourceDefinitions, for tests/k8s; may be repeated"
    )


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with SIZE/SPLIT shards of a few real drawings at 64 and 256 pixels."""
    out = str(tmp_path_factory.mktemp("openmoji"))
    prepare(PrepareConfig(out=out, sizes=(64, 256), limit=48, workers=1))
    return out
