"""What the tests of the loop train on."""

from __future__ import annotations

import pytest
from tests.support.embedded import save_clip
from tests.support.loop_runs import Records

from unclip.recipes.clip import tiny_architecture
from unclip.training.in_process import embed_here


@pytest.fixture(scope="session")
def records(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Records:
    root = tmp_path_factory.mktemp("loop")
    clip = save_clip(str(root), tiny_architecture())
    pictures = {size: f"{openmoji}/{size}/train" for size in ("64", "256")}
    return pictures | {"clip": clip, "embedded": embed_here(pictures["64"], str(root / "embedded"), clip)}
