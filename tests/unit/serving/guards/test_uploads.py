"""What clients send: pictures of every kind that files have, and bodies of every size, over real HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request, UploadFile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unclip.serving.errors import ApiError, InvalidRequest, TooLarge
from unclip.serving.guards import uploads as module
from unclip.serving.guards.uploads import BodyLimit, Upload, read_keep, read_picture, square, square_keep

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
PIXELS[..., 3] = np.where(np.arange(9) < 4, 0, 255)
FORMS = ["png", "jpeg", "webp"]
LIMIT = 4096


def encoded(image: Image.Image, form: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def read(content: bytes, max_pixels: int = 10_000) -> Upload:
    return read_picture(content, field="image", max_pixels=max_pixels)


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG of that size, without any pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    sizes = [struct.pack(">I", len(chunk) - 4) for chunk in chunks]
    checks = [struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(b"".join(parts) for parts in zip(sizes, chunks, checks, strict=True))


def test_a_png_comes_pixel_by_pixel() -> None:
    found = read(encoded(Image.fromarray(PIXELS[..., :3])))
    np.testing.assert_array_equal(found.pixels, PIXELS[..., :3])
    assert found.pixels.dtype == np.uint8
    assert found.alpha is None


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str) -> None:
    flat = Image.new("RGB", (12, 7), (200, 40, 90))
    found = read(encoded(flat, form))
    assert found.pixels.shape == (7, 12, 3)
    assert np.abs(found.pixels.astype(int) - (200, 40, 90)).max() <= 4


@pytest.mark.parametrize("form", ["png", "webp"])
def test_transparency_is_kept_apart_and_stands_on_white(form: str) -> None:
    options = {"lossless": True, "exact": True} if form == "webp" else {}
    found = read(encoded(Image.fromarray(PIXELS), form, **options))
    np.testing.assert_array_equal(found.alpha, PIXELS[..., 3])
    np.testing.assert_array_equal(found.pixels[:, 4:], PIXELS[:, 4:, :3])
    assert (found.pixels[:, :4] == 255).all()


def test_half_transparent_pixels_keep_their_alpha() -> None:
    grey = Image.new("LA", (3, 2), (0, 128))
    found = read(encoded(grey))
    assert found.alpha is not None
    assert (found.alpha == 128).all()
    assert (found.pixels == 127).all()


def test_palettes_with_transparent_colours() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((3, 1), 1)
    found = read(encoded(image, transparency=0))
    assert found.alpha is not None
    np.testing.assert_array_equal(found.alpha == 0, np.array([[True] * 4, [True] * 3 + [False]]))
    assert tuple(found.pixels[1, 3]) == (200, 100, 50)


def test_sixteen_bits_count_by_their_high_byte() -> None:
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    found = read(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(found.pixels[0, :, 0], [0, 0, 1, 255])
    assert found.alpha is None


def test_cmyk_becomes_rgb() -> None:
    found = read(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg"))
    assert found.pixels.shape == (8, 8, 3)
    red, green, blue = found.pixels[4, 4].astype(int)
    assert (red > 240, green < 15, blue < 15) == (True, True, True)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_and_their_transparency_stand_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read(encoded(Image.fromarray(PIXELS), exif=exif))
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1),
        6: np.rot90(PIXELS, -1),
        7: np.rot90(PIXELS, 2).swapaxes(0, 1),
        8: np.rot90(PIXELS),
    }[orientation]
    np.testing.assert_array_equal(found.alpha, turned[..., 3])
    opaque = turned[..., 3] == 255
    np.testing.assert_array_equal(found.pixels[opaque], turned[opaque][:, :3])


def test_photographs_with_a_preview_behind_them_are_no_animations() -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    found = read(encoded(first, "mpo", save_all=True, append_images=[second]))
    assert found.pixels[4, 4, 0] > 240


@pytest.mark.parametrize("form", ["png", "webp"])
def test_animations_are_refused(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    with pytest.raises(InvalidRequest, match="image: an animation") as caught:
        read(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    assert caught.value.param == "image"


@pytest.mark.parametrize("form", ["gif", "bmp", "tiff", "avif", "ico", "ppm"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(InvalidRequest, match="image: not a PNG, JPEG or WebP file"):
        read(encoded(Image.new("RGB", (8, 8)), form))


@pytest.mark.parametrize(
    "content", [b"", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x04\x00\x00\x00WEBP"]
)
def test_what_is_no_picture_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^image: "):
        read(content)


@pytest.mark.parametrize("form", FORMS)
def test_truncated_pictures_are_refused(form: str) -> None:
    content = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)), form)
    with pytest.raises(InvalidRequest, match=r"^image: ") as caught:
        read(content[: len(content) // 2])
    assert (caught.value.code, caught.value.status) == ("invalid_image", 400)


def test_bombs_are_known_by_their_header() -> None:
    """The file ends behind the header: what decoded any of it would call it broken."""
    with pytest.raises(TooLarge, match="image: 4001x5000 pixels: more than 20000000") as caught:
        read(png_header(4001, 5000), max_pixels=20_000_000)
    assert caught.value.status == 413
    with pytest.raises(TooLarge):
        read(png_header(2**31 - 1, 2**31 - 1))
    with pytest.raises(InvalidRequest):  # not too large: the same file is decoded, and broken
        read(png_header(4000, 5000), max_pixels=20_000_000)


def test_pictures_up_to_the_bound_are_read() -> None:
    content = encoded(Image.new("RGB", (100, 50)))
    assert read(content, max_pixels=5000).pixels.shape == (50, 100, 3)
    with pytest.raises(TooLarge):
        read(content, max_pixels=4999)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMS), st.data())
def test_corrupt_pictures_raise_nothing_else(form: str, data: st.DataObject) -> None:
    content = bytearray(encoded(Image.fromarray(PIXELS[..., :3]), form))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ApiError):
        found = read(bytes(content))
        assert found.pixels.dtype == np.uint8
        assert found.pixels.shape[2] == 3


def test_square_is_the_middle() -> None:
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, 2:6] = 77
    np.testing.assert_array_equal(square(picture, 4), np.full((4, 4, 3), 77, np.uint8))


def test_wholly_transparent_pixels_are_drawn_anew() -> None:
    alpha = np.array([[0, 1, 255]], np.uint8)
    keep = read_keep(Upload(np.zeros((1, 3, 3), np.uint8), alpha), (1, 3))
    np.testing.assert_array_equal(keep, [[False, True, True]])


@pytest.mark.parametrize("alpha", [None, np.full((1, 3), 7, np.uint8)])
def test_masks_without_a_hole_are_refused(alpha: Any) -> None:
    with pytest.raises(InvalidRequest, match="mask: no pixel of it is fully transparent"):
        read_keep(Upload(np.zeros((1, 3, 3), np.uint8), alpha), (1, 3))


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="mask: has 3x1 pixels, its picture 3x2"):
        read_keep(Upload(np.zeros((1, 3, 3), np.uint8), np.zeros((1, 3), np.uint8)), (2, 3))


def test_resized_masks_keep_only_what_is_wholly_kept() -> None:
    keep = np.ones((8, 12), bool)
    keep[:, 2:6] = False  # of the middle square the left half
    small = square_keep(keep, 4)
    assert not small[:, :2].any()
    assert small[:, 3].all()
    keep[3, 7] = False
    assert not square_keep(keep, 2)[0].any()
    np.testing.assert_array_equal(square_keep(keep[:, :8], 8), keep[:, :8])


@contextmanager
def served(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


app = FastAPI()


@app.post("/raw")
async def raw(request: Request) -> int:
    return len(await request.body())


@app.post("/json")
async def parsed(body: dict[str, str]) -> int:
    return len(body["text"])


@app.post("/form")
async def form(file: UploadFile) -> int:
    return len(await file.read())


@app.post("/files")
async def files(request: Request) -> int:
    return len(await request.body())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(BodyLimit(app, limit=LIMIT, others={"/files": 2 * LIMIT})) as address:
        yield address


def refused(answer: httpx.Response) -> bool:
    if answer.status_code != 413:
        return False
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_too_large")
    assert answer.headers["connection"] == "close"
    return True


def chunks(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(512)


def test_bodies_up_to_the_limit_pass(url: str) -> None:
    assert httpx.post(f"{url}/raw", content=bytes(LIMIT)).json() == LIMIT
    assert httpx.post(f"{url}/raw", content=chunks(LIMIT // 512)).json() == LIMIT
    assert httpx.post(f"{url}/files", content=bytes(2 * LIMIT)).json() == 2 * LIMIT


def test_announced_bodies_are_refused_before_they_come(url: str) -> None:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
    with closing(connection):
        connection.putrequest("POST", "/raw")
        connection.putheader("content-length", str(10**12))
        connection.endheaders()
        answer = connection.getresponse()
        assert refused(httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read()))


@pytest.mark.parametrize("path", ["raw", "files"])
def test_streamed_bodies_are_refused_as_they_come(url: str, path: str) -> None:
    assert refused(httpx.post(f"{url}/{path}", content=chunks(2 * LIMIT // 512 + 1)))


def test_frameworks_that_parse_the_body_answer_no_error_of_their_own(url: str) -> None:
    def long_json() -> Iterator[bytes]:
        yield b'{"text": "'
        yield from (b"a" * 512 for _ in range(20))
        yield b'"}'

    assert httpx.post(f"{url}/json", json={"text": "abc"}).json() == 3
    assert refused(httpx.post(f"{url}/json", content=long_json(), headers={"content-type": "application/json"}))
    assert httpx.post(f"{url}/form", files={"file": bytes(100)}).json() == 100
    request = httpx.Request("POST", f"{url}/form", files={"file": bytes(2 * LIMIT)})
    headers = {"content-type": request.headers["content-type"]}
    assert refused(httpx.post(f"{url}/form", content=iter([request.read()]), headers=headers))


def test_no_more_is_taken_than_the_limit() -> None:
    """Whoever streams without an end is stopped; the app sees each part once, as it comes."""
    parts = iter(range(10**6))
    seen, sent = [], []

    async def endless() -> dict[str, Any]:
        next(parts)
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    async def reader(scope: Any, receive: Any, send: Any) -> None:
        while True:
            seen.append(len((await receive())["body"]))

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(BodyLimit(reader, limit=LIMIT)({"type": "http", "path": "/", "headers": []}, endless, send))
    assert (seen, next(parts)) == ([1000] * 4, 5)
    assert sent[0]["status"] == 413


def test_bodies_that_trickle_are_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.1)
    connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
    with closing(connection):
        connection.putrequest("POST", "/raw")
        connection.putheader("content-length", "100")
        connection.endheaders(b"a")
        answer = connection.getresponse()
        assert answer.status == 504
        assert json.loads(answer.read())["error"]["code"] == "timeout"


def test_who_is_fast_enough_has_time_and_answers_may_take_longer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "_LEAST_RATE", 512)

    async def slowly(scope: Any, receive: Any, send: Any) -> None:
        parts = [await receive() for _ in range(3)]
        await asyncio.sleep(0.05)
        gone = await receive()
        assert [len(part["body"]) for part in parts] == [1024, 1024, 0]
        assert gone["type"] == "http.disconnect"

    parts = [{"type": "http.request", "body": bytes(1024), "more_body": True} for _ in range(2)]
    coming = iter([*parts, {"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(coming)

    asyncio.run(BodyLimit(slowly, limit=LIMIT)({"type": "http", "path": "/", "headers": []}, receive, None))
    assert next(coming, None) is None
