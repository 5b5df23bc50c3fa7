"""A running app with real small weights, and a browser tab that shows its playground."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright
from tests.support.bundles import save_tiny_bundle
from tests.support.playground import Tab
from tests.support.serving import RunningApp, running_app

from unclip.serving.config import PolicyConfig, ServeConfig


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("bundle"))
    save_tiny_bundle(uri)
    return uri


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def app(bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    blocklist = tmp_path_factory.mktemp("policy") / "blocklist.txt"
    blocklist.write_text("forbidden\n")
    policy = PolicyConfig(blocklist=str(blocklist))
    with running_app(ServeConfig(bundle=bundle, device="cpu", policy=policy)) as app:
        yield app


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def tab(context: BrowserContext, app: RunningApp) -> Iterator[Tab]:
    """Ends with no error on the console, and nothing asked of other hosts."""
    tab = Tab(context, app.url)
    yield tab
    assert tab.errors == []
    assert [url for url in tab.requests if not url.split()[1].startswith((f"{app.url}/", "blob:"))] == []
