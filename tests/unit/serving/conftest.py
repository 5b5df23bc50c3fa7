"""One running server of the tiny bundle, the official client, and the pipeline whose pictures it shall make."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI
from tests.support.serving import RunningApp, running_app

from unclip.pipelines.pipeline import Pipeline
from unclip.serving.config import LimitsConfig, ServeConfig


@pytest.fixture(scope="session")
def app(tiny_bundle: str) -> Iterator[RunningApp]:
    """All stages in one process."""
    with running_app(ServeConfig(bundle=tiny_bundle, limits=LimitsConfig(steps=60))) as running:
        yield running


@pytest.fixture(scope="session")
def client(app: RunningApp) -> Iterator[OpenAI]:
    """As users make it."""
    with OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def pipeline(tiny_bundle: str) -> Pipeline:
    """Of the same bundle."""
    return Pipeline.from_bundle(tiny_bundle)
