"""The page about an upsampler: its numbers beside those of plain interpolation, and pictures of both."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from unclip.data.decode import Picture
from unclip.evaluation.feature_folder import Features
from unclip.evaluation.upsampler_metrics import INTERPOLATED
from unclip.utils.html_page import Figure, HtmlPage

_SIDE = 220
_NAMES = {
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
    "red": "red, levels of 255 above the real ones",
    "green": "green",
    "blue": "blue",
    "saturation": "saturation above the real one",
    "clip_distance": "CLIP distance",
    "lpips": "LPIPS",
}


@dataclass(frozen=True)
class ShownPicture:
    """Record `row` of the set at its sizes, uint8 (H, W, 3) each."""

    row: int
    low_res: Picture
    sample: Picture
    real: Picture
    interpolated: Picture


def upsampler_page(
    protocol: Mapping[str, Any],
    found: Mapping[str, Mapping[str, float]],
    features: Features,
    shown: Sequence[ShownPicture],
) -> HtmlPage:
    """All but the protocol.

    Args:
        found: the metrics.
        features: with a column for each of them.
    """
    judged, sizes = protocol["records"], protocol["pictures"]
    page = HtmlPage(f"Evaluation of {protocol['kind']} in {protocol['bundle']['uri']}")
    page.note(
        f"{judged['rows']:,} of {judged['available']:,} pictures of {judged['uri']}, from {sizes['low_res_size']} to "
        f"{sizes['image_size']} pixels."
    )
    page.heading("Numbers, and those of plain interpolation (95% intervals over pictures)")
    page.table(
        [(_NAMES[name], *(_interval(numbers, kind) for kind in _KINDS)) for name, numbers in found.items()],
        ("", "sample", "interpolation", "difference"),
    )
    page.histograms(
        [
            (
                f"{_NAMES[name]}: difference to interpolation",
                features.columns[name] - features.columns[name + INTERPOLATED],
            )
            for name in found
        ]
    )
    if shown:
        page.heading("Pictures")
        titles = (f"{sizes['low_res_size']} px", "sample", "real", "interpolation")
        page.grid(
            titles, [(_text(picture, features), list(_figures(picture, features))) for picture in shown], side=_SIDE
        )
    return page


_KINDS = ("", "interpolated_", "difference_")


def _interval(numbers: Mapping[str, float], kind: str) -> str:
    return f"{numbers[kind + 'mean']:.4g} ({numbers[kind + 'low']:.4g} to {numbers[kind + 'high']:.4g})"


def _text(picture: ShownPicture, features: Features) -> str:
    return f"{features.captions[picture.row] or ''} ({features.ids[picture.row]})"


def _figures(picture: ShownPicture, features: Features) -> Iterator[Figure]:
    psnr, smooth = (float(features.columns[name][picture.row]) for name in ("psnr", "psnr" + INTERPOLATED))
    yield _figure(picture.low_res, "")
    yield _figure(picture.sample, f"{psnr:.1f} dB")
    yield _figure(picture.real, "")
    yield _figure(picture.interpolated, f"{smooth:.1f} dB")


def _figure(picture: Picture, text: str) -> Figure:
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    return sink.getvalue(), "image/png", text
