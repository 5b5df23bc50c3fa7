"""Pictures that are broken, hostile or merely unusual, made from nothing; each with the reason it is refused for."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

Case = tuple[str, bytes | None, str | None]
"""(name, encoded picture, reason; None where it is kept all the same)."""


def drawing(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    """A picture with structure, so that each part of its file matters."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def insert_chunk(data: bytes, chunk: bytes) -> bytes:
    """A chunk put behind a PNG's header."""
    return data[:33] + chunk + data[33:]


def jpeg_segment(data: bytes, marker: int, content: bytes) -> bytes:
    """A segment put behind a JPEG's first two bytes."""
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + data[2:]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size than its pixels have."""
    data = encode(drawing(), "JPEG")
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def tiff(*tags: tuple[int, int, int, int], count: int | None = None, following: int = 0) -> bytes:
    """A TIFF of tags (number, type, values, value or offset), perhaps claiming another count of them."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags) if count is None else count)
    return header + entries + struct.pack("<I", following)


def zeros(megabytes: int) -> bytes:
    """A zlib stream that becomes so many megabytes."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def truncated() -> Iterator[Case]:
    image = drawing()
    options: dict[str, dict[str, Any]] = {
        "JPEG": {},
        "PNG": {},
        "WEBP": {"lossless": True},
        "GIF": {},
        "BMP": {},
        "AVIF": {},
    }
    files = {form.lower(): encode(image, form, **kind) for form, kind in options.items()}
    files["progressive_jpeg"] = encode(image, "JPEG", progressive=True)
    files["tiff"] = encode(image, "TIFF", compression="tiff_lzw")
    in_header = {"gif": 10, "avif": 75, "tiff": 90}  # percent: GIF's palette, AVIF's boxes, TIFF's tags at its end
    for name, data in files.items():
        for percent in (10, 25, 50, 75, 90):
            reason = "not_a_picture" if percent <= in_header.get(name, 0) else "broken_picture"
            yield f"{name}_cut_at_{percent}_percent", data[: len(data) * percent // 100], reason
        yield f"{name}_of_four_bytes", data[:4], "not_a_picture"


def no_pictures() -> Iterator[Case]:
    yield "null", None, "no_image"
    yield "zero_bytes", b"", "no_image"
    texts = {
        "one_byte": b"\xff",
        "html_as_jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "json_error": b'{"error": "rate limited"}',
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "gzipped_png": gzip.compress(encode(drawing())),
        "icon": encode(drawing(), "ICO"),
        "photoshop": b"8BPS\0\1" + bytes(40),
        "random_bytes": np.random.default_rng(0).bytes(4096),
        "zeros": bytes(4096),
        "utf16_text": "a caption".encode("utf-16"),
        "jpeg_of_start_and_end": b"\xff\xd8\xff\xd9",
        "png_signature_alone": b"\x89PNG\r\n\x1a\n",
        "video": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(64),
    }
    for name, data in texts.items():
        yield name, data, "not_a_picture"


def too_large() -> Iterator[Case]:
    gif = encode(drawing(), "GIF")
    frame = gif.index(b"\x2c", 13 + 3 * 256)
    bmp = encode(drawing(), "BMP")
    side = struct.pack("<i", 65_000)
    scans = encode(drawing(), "JPEG", progressive=True)
    start = scans.index(b"\xff\xda")
    end = scans.index(b"\xff\xda", start + 2)
    cases = {
        "png_of_65000_by_65000": png(65_000, 65_000, png_chunk(b"IDAT", zeros(1))),
        "png_of_2_billion_by_2_billion": png(2**31 - 1, 2**31 - 1, png_chunk(b"IDAT", zeros(1))),
        "png_of_9000_by_9000": png(9_000, 9_000, png_chunk(b"IDAT", zeros(78))),
        "png_with_a_side_of_70000": png(70_000, 1, png_chunk(b"IDAT", zlib.compress(bytes(70_001)))),
        "jpeg_of_65500_by_65500": jpeg_of_size(65_500, 65_500),
        "gif_of_65535_by_65535": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "gif_frame_beyond_its_screen": gif[: frame + 5] + b"\xff\xff\xff\xff" + gif[frame + 9 :],
        "bmp_of_65000_by_65000": bmp[:18] + side + side + bmp[26:],
        "tiff_of_100000_by_100000": tiff(
            (256, 4, 1, 100_000),
            (257, 4, 1, 100_000),
            (258, 3, 1, 8),
            (259, 3, 1, 1),
            (262, 3, 1, 1),
            (273, 4, 1, 8),
            (277, 3, 1, 1),
            (278, 4, 1, 100_000),
            (279, 4, 1, 8),
        ),
        "jpeg_of_a_thousand_scans": scans[:end] + scans[start:end] * 1000 + scans[end:],
    }
    for name, data in cases.items():
        yield name, data, "too_large"


def corrupt() -> Iterator[Case]:
    good = encode(drawing())
    jpeg = encode(drawing(), "JPEG")
    idat = good.index(b"IDAT")
    cases = {
        "png_with_a_bad_checksum_in_its_header": (good[:29] + b"\0\0\0\0" + good[33:], "not_a_picture"),
        "png_with_a_flipped_byte": (
            good[: idat + 50] + bytes([good[idat + 50] ^ 255]) + good[idat + 51 :],
            "broken_picture",
        ),
        "png_without_pixels": (png(8, 8), "broken_picture"),
        "png_of_0_by_0": (png(0, 0, png_chunk(b"IDAT", zlib.compress(b""))), "not_a_picture"),
        "png_of_3_bits": (png(8, 8, png_chunk(b"IDAT", zlib.compress(bytes(99))), depth=3), "not_a_picture"),
        "png_with_an_icc_bomb": (insert_chunk(good, png_chunk(b"iCCP", b"bomb\0\0" + zeros(64))), "broken_picture"),
        "png_with_a_text_bomb": (insert_chunk(good, png_chunk(b"zTXt", b"bomb\0\0" + zeros(128))), "broken_picture"),
        "jpeg_without_height": (jpeg_of_size(64, 0), "not_a_picture"),
        "jpeg_without_tables": (
            jpeg.replace(b"\xff\xdb", b"\xff\xe9").replace(b"\xff\xc4", b"\xff\xe9"),
            "broken_picture",
        ),
        "jpeg_of_zeros_behind_its_header": (jpeg[: jpeg.index(b"\xff\xda") + 14], "broken_picture"),
        "tiff_of_a_billion_values": (tiff((256, 4, 10**9, 8), (257, 4, 10**9, 8)), "not_a_picture"),
        "tiff_of_65535_tags_it_lacks": (tiff((256, 4, 1, 8), count=65_535), "not_a_picture"),
        "tiff_without_tags": (tiff(), "not_a_picture"),
        "tiff_of_floats": (encode(Image.new("F", (8, 8), 0.5), "TIFF"), "unsupported_pixels"),
        "tiff_of_32_bits": (encode(Image.new("I", (8, 8), 70_000), "TIFF"), "unsupported_pixels"),
    }
    for name, (data, reason) in cases.items():
        yield name, data, reason


def unusual() -> Iterator[Case]:
    """What looks suspicious and is a picture all the same."""
    image = drawing()
    jpeg, good = encode(image, "JPEG"), encode(image)
    orientation = struct.pack("<HHII", 0x0112, 3, 1, 9)
    frames = [drawing(seed, 16, 16) for seed in range(300)]
    bmp = encode(image, "BMP")
    palette = image.quantize(8)
    palette.info["transparency"] = 0
    cases = {
        "png_called_jpg": good,
        "exif_orientation_9": jpeg_segment(jpeg, 0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0" + orientation + bytes(4)),
        "exif_of_noise": jpeg_segment(jpeg, 0xE1, b"Exif\0\0" + np.random.default_rng(1).bytes(65_000)),
        "exif_that_points_nowhere": jpeg_segment(jpeg, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f"),
        "exif_of_65535_tags": jpeg_segment(jpeg, 0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + orientation * 9),
        "icc_profile_of_noise": encode(image, "JPEG", icc_profile=np.random.default_rng(2).bytes(70_000)),
        "jpeg_with_a_zip_behind_it": jpeg + b"PK\x03\x04" + bytes(500),
        "cmyk_jpeg": encode(image.convert("CMYK"), "JPEG"),
        "one_bit_png": encode(image.convert("1")),
        "sixteen_bit_png": encode(Image.fromarray((np.arange(3072, dtype=np.uint16) * 21).reshape(48, 64))),
        "grey_with_alpha": encode(image.convert("LA")),
        "palette_with_transparency": encode(palette),
        "gif_of_300_frames": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp_of_300_frames": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "png_of_300_frames": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "tiff_of_two_pages": encode(image, "TIFF", save_all=True, append_images=frames[:1]),
        "bmp_from_top_to_bottom": bmp[:22] + struct.pack("<i", -48) + bmp[26:],
        "one_pixel": encode(Image.new("RGB", (1, 1))),
        "sixty_five_thousand_by_one": encode(Image.new("L", (65_000, 1))),
        "more_pixel_data_than_pixels": png(64, 48, png_chunk(b"IDAT", zeros(256))),
    }
    for name, data in cases.items():
        yield name, data, None


def picture_cases() -> Iterator[Case]:
    for family in (no_pictures, truncated, too_large, corrupt, unusual):
        yield from family()
