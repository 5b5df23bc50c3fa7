"""What the playground makes, in headless Chromium with a running app."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from playwright.sync_api import expect
from tests.support.playground import Tab, save_picture
from tests.support.serving import RunningApp

STAGES = ("Prior", "Decoder", "Upsampler to 256")
DROP = """([bytes, name]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


def test_prompt_sharpens_through_the_stages(tab: Tab) -> None:
    tab.the("#prompt").wait_for()
    tab.page.evaluate(
        """() => {
          window.sides = []; window.said = []; window.shown = [];
          picture.addEventListener("load", () => sides.push(picture.naturalWidth));
          new MutationObserver(() => shown.push(picture.src)).observe(picture, { attributeFilter: ["src"] });
          new MutationObserver(() => said.push(document.getElementById("status").textContent))
            .observe(document.getElementById("status"), { childList: true });
        }"""
    )
    tab.set(prompt="a red heart", size="32x32", num_inference_steps=60)
    final = tab.make()
    assert final.shape == (32, 32, 3)
    sides, said, shown = tab.page.evaluate("[sides, said, shown]")
    assert len(set(shown)) >= 3  # not all of which a slow browser has time to load
    assert sides[0] == 16
    assert sides[-1] == 32
    stages = [text for text in said if text in STAGES]
    assert "Decoder" in stages
    assert stages == sorted(stages, key=STAGES.index)
    assert tab.the("#bar").is_hidden()


def test_seed_is_kept_or_new(tab: Tab) -> None:
    tab.set(prompt="a red heart", size="16x16")
    first, seed = tab.make(), tab.the("#seed").input_value()
    tab.the("#lock").click()
    np.testing.assert_array_equal(tab.make(), first)
    assert tab.the("#seed").input_value() == seed
    tab.set(guidance_scale=6)
    assert not np.array_equal(tab.make(), first)
    tab.set(guidance_scale="")
    tab.the("#lock").click()
    assert not np.array_equal(tab.make(), first)
    assert tab.the("#seed").input_value() != seed
    tab.set(seed=seed)
    assert tab.the("#lock").get_attribute("aria-pressed") == "true"
    np.testing.assert_array_equal(tab.make(), first)
    assert tab.the("#strip li").count() == 5
    tab.the("#strip button").nth(2).click()
    assert not np.array_equal(tab.picture(), first)


def test_each_of_several_pictures_has_its_seed(tab: Tab) -> None:
    tab.set(prompt="a red heart", size="16x16", n=3, seed=40)
    first = tab.make()
    tab.page.get_by_role("button", name="Picture 3").click()
    third = tab.picture()
    assert not np.array_equal(first, third)
    expect(tab.the("#steps")).to_have_text("Seed 42")
    assert '"seed":42}' in (tab.the("#code").text_content() or "")
    tab.set(n=1, seed=42)
    assert np.abs(tab.make().astype(int) - third).max() <= 1


def test_cancel_ends_the_work(tab: Tab, app: RunningApp) -> None:
    tab.set(prompt="a red heart", size="16x16")
    before = tab.make()
    tab.set(num_inference_steps=1000)
    tab.the("#make").click()
    expect(tab.the("#steps [aria-current]")).to_contain_text("Decoder")
    tab.the("#cancel").click()
    expect(tab.the("#steps")).to_have_text("Cancelled")
    expect(tab.the("#make")).to_be_visible()
    np.testing.assert_array_equal(tab.picture(), before)
    tab.wait(lambda: app.service.admission.in_flight == 0)
    assert tab.the("#failure").text_content() == ""


def test_dropped_picture_gives_variations(tab: Tab, tmp_path: Path) -> None:
    save_picture(tmp_path / "in.png", seed=0)
    tab.the("#modes [role=tab]").first.wait_for()
    tab.page.evaluate(DROP, [list((tmp_path / "in.png").read_bytes()), "my picture;1.png"])
    expect(tab.page.get_by_role("tab", name="Variations")).to_have_attribute("aria-selected", "true")
    expect(tab.the("#slot-image")).to_contain_text("my picture;1.png")
    tab.set(size="16x16", n=2)
    first = tab.make()
    tab.page.get_by_role("button", name="Picture 2").click()
    assert not np.array_equal(tab.picture(), first)
    assert "-F 'image=@my_picture_1.png'" in (tab.the("#code").text_content() or "")


def test_blend_is_fetched_once_and_walked(tab: Tab, tmp_path: Path) -> None:
    for index in range(2):
        save_picture(tmp_path / f"{index}.png", seed=index)
    tab.enter("Blend")
    tab.the("#slot-image input").set_input_files(tmp_path / "0.png")
    tab.the("#slot-second input").set_input_files(tmp_path / "1.png")
    tab.set(size="16x16", frames=3)
    frames = [tab.make()]
    slider = tab.page.get_by_role("slider", name="Between the two")
    slider.focus()
    said = [tab.the("#place").text_content()]
    for _ in range(2):
        tab.page.keyboard.press("ArrowRight")
        frames.append(tab.picture())
        said.append(slider.get_attribute("aria-valuetext"))
    assert said == ["0%", "50%", "100%"]
    assert not np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[1], frames[2])
    assert sum(request.startswith("POST") for request in tab.requests) == 1


def test_text_diff_is_walked(tab: Tab, tmp_path: Path) -> None:
    save_picture(tmp_path / "in.png", seed=0)
    tab.enter("Text diff")
    tab.the("#slot-image input").set_input_files(tmp_path / "in.png")
    tab.set(prompt="a blue star", source_prompt="a red heart", size="16x16", frames=3)
    first = tab.make()
    tab.page.get_by_role("slider", name="Towards the words").fill("2")
    expect(tab.the("#place")).to_have_text("50%")
    assert not np.array_equal(tab.picture(), first)


def _painted(tab: Tab) -> npt.NDArray[np.bool_]:
    """What is painted (S, S)."""
    values = tab.the("#mask").evaluate(
        "mask => [...mask.getContext('2d').getImageData(0, 0, mask.width, mask.height).data]"
    )
    side = int((len(values) // 4) ** 0.5)
    return np.asarray(np.array(values).reshape(side, side, 4)[..., 3] >= 128)


def test_edit_draws_what_the_mouse_painted(tab: Tab, tmp_path: Path) -> None:
    given = save_picture(tmp_path / "in.png", seed=0)
    tab.enter("Edit")
    tab.the("#slot-image input").set_input_files(tmp_path / "in.png")
    tab.set(prompt="a red heart", size="32x32")
    tab.the("#make").click()
    expect(tab.the("#painter .error")).to_have_text("Paint over what shall be drawn anew.")
    expect(tab.the("#mask")).to_be_focused()
    box = tab.the("#mask").bounding_box()
    assert box is not None
    mouse = tab.page.mouse
    mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    mouse.down()
    mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.3 * box["height"], steps=4)
    mouse.up()
    painted = _painted(tab)
    assert painted[9, 10:22].all()
    assert not painted[16:].any()
    picture = tab.make()
    np.testing.assert_array_equal(picture[~painted], given[~painted])
    assert (picture[painted] != given[painted]).mean() > 0.5


def test_mask_is_painted_by_keyboard(tab: Tab, tmp_path: Path) -> None:
    save_picture(tmp_path / "in.png", seed=0, side=100)
    tab.enter("Edit")
    tab.the("#slot-image input").set_input_files(tmp_path / "in.png")
    tab.the("#mask").focus()
    keys = tab.page.keyboard
    keys.press("Shift+ArrowUp")
    keys.down(" ")
    for _ in range(10):
        keys.press("ArrowRight")
    keys.up(" ")
    stroke = _painted(tab)
    assert stroke[40, 50:71].all()
    assert not stroke[60:].any()
    keys.press("ArrowDown")
    np.testing.assert_array_equal(_painted(tab), stroke)
    keys.press("ArrowUp")
    keys.press("e")
    keys.press(" ")
    assert not _painted(tab)[40, 70]
    assert _painted(tab)[40, 50]
    keys.press("z")
    np.testing.assert_array_equal(_painted(tab), stroke)
    expect(tab.the("#painted")).to_have_text(f"{round(100 * stroke.mean())}% of the picture is painted.")
    keys.press("z")
    assert not _painted(tab).any()
    tab.the("#clear").focus()
    keys.press("Enter")
    expect(tab.the("#painted")).to_have_text("0% of the picture is painted.")
