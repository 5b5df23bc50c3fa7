"""The playground as a person uses it: in headless Chromium, and by the calls that it lets them copy."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from playwright.sync_api import BrowserContext, Download, Locator, Page, expect

Pixels = npt.NDArray[np.uint8]
_PATIENCE_MS = 15_000
_PIXELS = """image => {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
}"""


class Tab:
    """A page of one visit, and what went wrong in it."""

    def __init__(self, context: BrowserContext, address: str, mode: str = "create") -> None:
        self.address = address
        self.page: Page = context.new_page()
        self.page.set_default_timeout(_PATIENCE_MS)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(f"{request.method} {request.url}"))
        self.page.goto(f"{address}/#{mode}")

    def the(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def set(self, **fields: object) -> None:
        """By the fields' names."""
        for name, value in fields.items():
            field = self.the(f"#{name}")
            field.select_option(str(value)) if name == "size" else field.fill(str(value))

    def make(self) -> Pixels:
        """Presses the button, and waits for what comes of it."""
        self.the("#make").click()
        return self.done()

    def done(self) -> Pixels:
        expect(self.the("#cancel")).to_be_hidden(timeout=_PATIENCE_MS)
        expect(self.the("#steps")).to_have_text(re.compile(r"^Seed \d+$"))
        return self.picture()

    def picture(self) -> Pixels:
        """The one on the screen, uint8 (S, S, 3)."""
        image = self.the("#picture")
        image.evaluate("image => image.decode()")
        values = np.array(image.evaluate(_PIXELS), np.uint8)
        side = int((len(values) // 4) ** 0.5)
        return values.reshape(side, side, 4)[..., :3]

    def enter(self, mode: str) -> None:
        """By the name of its tab."""
        self.page.get_by_role("tab", name=mode).click()

    def slots(self) -> list[Locator]:
        """Where files go in this mode."""
        return self.the(".field:visible > .slot input").all()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it is true."""
        for _ in range(_PATIENCE_MS // 20):
            if condition():
                return
            self.page.wait_for_timeout(20)
        raise TimeoutError(f"waited for {_PATIENCE_MS / 1000:g} s")

    def copied(self) -> str:
        """The call that is shown, by way of the clipboard."""
        self.the("#copy").click()
        expect(self.the("#copy")).to_have_text("Copied")
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def save_inputs(self, folder: Path) -> None:
        """The files that the call reads."""
        if self.the("#save").is_hidden():
            return
        downloads: list[Download] = []
        self.page.on("download", lambda download: downloads.append(download))
        count = (self.the("#reads span").text_content() or "").count(".png")
        self.the("#save").click()
        self.wait(lambda: len(downloads) == count)
        for download in downloads:
            download.save_as(folder / download.suggested_filename)


def save_picture(path: Path, *, seed: int, side: int = 32) -> Pixels:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def made_by(command: list[str], folder: Path, **variables: str) -> Pixels:
    """The picture that a copied call leaves in the folder."""
    result = folder / "picture.png"
    result.unlink(missing_ok=True)
    environment = os.environ | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(result) as picture:
        return np.asarray(picture.convert("RGB"))
