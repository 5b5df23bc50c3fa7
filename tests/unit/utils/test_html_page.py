"""Pages that need nothing else: escaped, self-contained, with histograms whose bars are the counts."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from unclip.utils.html_page import HtmlPage, histogram_svg


class Elements(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


HOSTILE = "<script>alert(1)</script> \" onerror='x' &amp;"


def test_hostile_text_stays_text_wherever_it_is_put() -> None:
    page = HtmlPage(HOSTILE)
    page.heading(HOSTILE)
    page.note(HOSTILE)
    page.table([(HOSTILE, 1)], (HOSTILE, "n"))
    page.histograms([(HOSTILE, np.arange(5.0))])
    page.pictures([(b"jpeg", "image/jpeg", HOSTILE)])
    page.picture(b"png", "image/png", HOSTILE)
    elements = Elements(page.html()).seen
    assert "script" not in {tag for tag, _ in elements}
    assert not any("onerror" in attributes for _, attributes in elements)
    assert [attributes["alt"] for tag, attributes in elements if tag == "img"] == [HOSTILE, HOSTILE]


def test_pictures_are_inside_the_file_and_nothing_is_loaded() -> None:
    page = HtmlPage("pictures")
    page.pictures([(b"\x00\xffpicture", "image/png", "a picture")])
    sources = [attributes["src"] or "" for tag, attributes in Elements(page.html()).seen if tag == "img"]
    assert [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources] == [
        b"\x00\xffpicture"
    ]
    assert "http" not in page.html()


@pytest.mark.parametrize(("value", "edges"), [(0.07, ["0", "0.14"]), (0.0, ["0", "1"]), (-2.0, ["-4", "0"])])
def test_values_that_are_all_the_same_are_one_bar_that_does_not_change_their_sign(
    value: float, edges: list[str]
) -> None:
    svg = histogram_svg("megapixels", np.full(5, value))
    assert [svg.count(f">{edge}</text>") for edge in edges] == [1, 1]
    assert re.findall(r": ([1-9]\d*)</title>", svg) == ["5"]


def test_a_histogram_has_a_bar_for_each_bin_and_says_what_it_left_out() -> None:
    values = np.concatenate([np.full(30, 1.0), np.full(10, 2.0), [np.nan, np.inf]])
    svg = histogram_svg("sides", values, bins=2)
    assert [int(count) for count in re.findall(r": (\d+)</title>", svg)] == [30, 10]
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', svg)]
    assert heights[0] == 3 * heights[1] or abs(heights[0] - 3 * heights[1]) < 0.2
    assert "median 1, 40 values, 2 without a number" in svg


def test_values_that_are_all_the_same_or_missing_still_make_a_plot() -> None:
    assert "median 256, 9 values" in histogram_svg("constant", np.full(9, 256.0))
    assert "no values" in histogram_svg("empty", np.array([]))


def test_numbers_are_grouped_and_right_aligned() -> None:
    page = HtmlPage("numbers")
    page.table([("rows", 1_234_567, 0.123456)])
    assert '<td class="number">1,234,567</td><td class="number">0.1235</td>' in page.html()
