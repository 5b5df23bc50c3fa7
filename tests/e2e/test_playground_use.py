"""How the playground is used: copied calls, keys, refusals, by keyboard and on a phone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, expect
from tests.support.playground import Tab, made_by, save_picture
from tests.support.serving import RunningApp, running_app

from unclip.serving.config import ServeConfig
from unclip.serving.guards.keys import KeyFile, KeyRecord, hash_key, new_key

MODES: dict[str, dict[str, Any]] = {
    "Create": {"prompt": 'it\'s "red" $HOME \\ &\nñ 🦊', "n": 2},
    "Variations": {"seed": 9},
    "Edit": {"prompt": "@a red heart", "guidance_scale": 1.5},
    "Blend": {"frames": 3, "num_inference_steps": 4},
    "Text diff": {"prompt": "a blue star", "source_prompt": "", "frames": 2},
}


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
@pytest.mark.parametrize("mode", MODES)
def test_copied_calls_repeat_the_picture(tab: Tab, tmp_path: Path, mode: str) -> None:
    inputs, folder = tmp_path / "inputs", tmp_path / "folder"
    inputs.mkdir()
    folder.mkdir()
    tab.enter(mode)
    for index, slot in enumerate(tab.slots()):
        (inputs / str(index)).mkdir()
        save_picture(inputs / str(index) / "a picture.png", seed=index)
        slot.set_input_files(inputs / str(index) / "a picture.png")
    if mode == "Edit":
        tab.the("#mask").press(" ")
    tab.set(size="16x16", **MODES[mode])
    shown = tab.make()
    if "frames" in MODES[mode]:
        tab.the("#position").press("End")
        shown = tab.picture()
    tab.the("#calls summary").click()
    tab.save_inputs(folder)
    np.testing.assert_array_equal(made_by(["bash", "-c", tab.copied()], folder), shown)
    tab.page.get_by_role("tab", name="Python").click()
    np.testing.assert_array_equal(made_by([sys.executable, "-c", tab.copied()], folder), shown)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A key, and the file that knows it."""
    key, path = new_key(), tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(KeyFile(keys=(KeyRecord(id="me", sha256=hash_key(key)),)).model_dump_json())
    return key, str(path)


def test_key_is_asked_for_where_the_server_wants_one(
    context: BrowserContext, bundle: str, key: tuple[str, str], tmp_path: Path
) -> None:
    right, file = key
    with running_app(ServeConfig(bundle=bundle, device="cpu", keys=file)) as app:
        tab = Tab(context, app.url)
        dialog = tab.page.get_by_role("dialog", name="This server asks for an API key")
        for given in ("uk-wrong", right):
            expect(dialog).to_be_visible()
            expect(tab.the("#ask-why")).not_to_be_empty()
            expect(tab.the("#key")).to_have_value("")
            tab.the("#key").fill(given)
            with tab.page.expect_response("**/v1/models"):
                tab.the("#key").press("Enter")
        expect(dialog).to_be_hidden()
        tab.set(prompt="a red heart", size="16x16")
        shown = tab.make()
        tab.the("#calls summary").click()
        call = tab.copied()
        assert right not in tab.page.content()
        assert right not in call
        np.testing.assert_array_equal(made_by(["bash", "-c", call], tmp_path, UNCLIP_API_KEY=right), shown)
        tab.page.get_by_role("tab", name="Python").click()
        np.testing.assert_array_equal(
            made_by([sys.executable, "-c", tab.copied()], tmp_path, UNCLIP_API_KEY=right), shown
        )
        assert tab.page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
        tab.page.reload()
        expect(tab.the("#model")).to_have_text("unclip")
    assert all("401" in error for error in tab.errors), tab.errors


def test_refusals_are_told_where_they_belong(tab: Tab, tmp_path: Path) -> None:
    tab.the("#modes [role=tab]").first.wait_for()
    tab.the("#make").click()
    expect(tab.the("#prompt")).to_be_focused()
    expect(tab.the("#prompt ~ .error")).not_to_be_empty()
    tab.set(prompt="something forbidden", n=99)
    tab.the("#make").click()
    expect(tab.the("#n")).to_be_focused()
    expect(tab.the("#prompt ~ .error")).to_be_empty()
    tab.set(n=1)
    tab.the("#make").click()
    expect(tab.the("#failure")).not_to_be_empty()
    expect(tab.the("#make")).to_be_visible()
    tab.set(prompt="a red heart", num_inference_steps=1)
    tab.the("#num_inference_steps").evaluate("field => { field.removeAttribute('max'); }")
    tab.set(num_inference_steps=100_000)
    tab.the("#make").click()
    expect(tab.the("#num_inference_steps ~ .error")).to_contain_text("num_inference_steps")
    expect(tab.the("#failure")).to_be_empty()
    tab.enter("Variations")
    tab.the("#make").click()
    expect(tab.the("#slot-image ~ .error")).to_contain_text("choose one")
    (tmp_path / "text.png").write_text("no picture")
    tab.the("#slot-image input").set_input_files(tmp_path / "text.png")
    expect(tab.the("#slot-image ~ .error")).to_have_text("text.png cannot be read as a picture.")
    assert all("400" in error for error in tab.errors), tab.errors
    assert len(tab.errors) == 1
    tab.errors.clear()


def test_everything_can_be_reached_by_keyboard(tab: Tab) -> None:
    tab.the("#modes [role=tab]").first.wait_for()
    keys = tab.page.keyboard
    assert _focused_by(tab, "Tab", 12) == [
        *("To the controls", "Create", "API", "prompt", "size", "n", "seed", "lock"),
        *("guidance_scale", "num_inference_steps", "More", "make"),
    ]
    tab.the("#prompt").focus()
    keys.type("a red heart")
    keys.press("Tab")
    keys.type("16")
    keys.press("Shift+Tab")
    keys.press("Enter")
    first = tab.done()
    expect(tab.the("#prompt")).to_be_focused()
    assert _focused_by(tab, "Shift+Tab", 6) == [
        "Repeat this by curl or Python",
        "Text diff",
        "Blend",
        "Edit",
        "Variations",
        "download",
    ]
    keys.press("Tab")
    keys.press("Enter")
    expect(tab.the("#slot-image button").first).to_be_focused()
    expect(tab.the("#slot-image")).to_contain_text(".png")
    tab.the("#make").focus()
    keys.press("Enter")
    assert not np.array_equal(tab.done(), first)
    expect(tab.the("#make")).to_be_focused()
    tab.the("#modes [role=tab]").nth(1).focus()
    keys.press("ArrowLeft")
    keys.press("ArrowLeft")
    expect(tab.page.get_by_role("tab", name="Text diff")).to_be_focused()
    expect(tab.the("#source_prompt")).to_be_visible()


def _focused_by(tab: Tab, key: str, times: int) -> list[str]:
    """Ids or texts of what gets the focus, each with an outline that shows it."""
    found = []
    for _ in range(times):
        tab.page.keyboard.press(key)
        name, outline = tab.page.evaluate(
            """() => {
              const element = document.activeElement;
              return [element.id || element.textContent.trim(), getComputedStyle(element).outlineStyle];
            }"""
        )
        assert outline == "solid", name
        found.append(name)
    return found


def test_phone_shows_all_without_sideways_scrolling(browser: Browser, app: RunningApp, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    save_picture(tmp_path / f"{'a long name of a picture ' * 4}.png", seed=0)
    tab = Tab(context, app.url)
    tab.set(prompt="a red heart " * 20, size="16x16", n=10)
    tab.the("#make").tap()
    tab.done()
    expect(tab.the("#frame")).to_be_in_viewport(ratio=1)
    tab.the("#calls summary").tap()
    tab.the("#more summary").tap()
    tab.the("#failure").evaluate("place => { place.textContent = 'unbroken'.repeat(20); }")
    for mode in MODES:
        tab.page.get_by_role("tab", name=mode).tap()
        for slot in tab.slots():
            slot.set_input_files(next(tmp_path.iterdir()))
        expect(tab.the("#painter")).to_be_visible(visible=mode == "Edit")
        assert tab.page.evaluate("document.documentElement.scrollWidth") == 360, mode
    assert tab.errors == []
    context.close()


def test_all_that_can_be_used_has_a_name(tab: Tab, tmp_path: Path) -> None:
    save_picture(tmp_path / "in.png", seed=0)
    tab.set(prompt="a red heart", size="16x16", n=2)
    tab.make()
    tab.the("#more summary").click()
    tab.the("#calls summary").click()
    roles = {"button", "textbox", "spinbutton", "combobox", "slider", "tab", "link", "application", "image", "tabpanel"}
    session = tab.page.context.new_cdp_session(tab.page)
    for mode in MODES:
        tab.enter(mode)
        for slot in tab.slots():
            slot.set_input_files(tmp_path / "in.png")
        nodes = [node for node in session.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        usable = [node for node in nodes if node["role"]["value"] in roles]
        assert len(usable) > 20
        assert [node["role"]["value"] for node in usable if not node["name"]["value"].strip()] == []
