"""Captions and attributes of real emoji."""

from __future__ import annotations

import pytest

from unclip.data.openmoji import OpenMoji, load_drawings
from unclip.data.openmoji_captions import COLOURS, HAIRS, SHAPES, SKIN_TONES

SELECTOR = "\ufe0f"
CAPTIONS = {
    "👩🏽‍⚕️": "a woman health worker with medium skin tone",
    "🧘🏼‍♀️": "a woman in a lotus position with medium-light skin tone",
    "👨🏿‍🦱": "a man with dark skin tone and curly hair",
    "👩‍🦰": "a woman with red hair",
    "🧑🏻‍🦲": "a bald person with light skin tone",
    "🧔🏾‍♂️": "a man with medium-dark skin tone and a beard",
    "👍🏽": "a thumbs up with medium skin tone",
    "🧝": "an elf",
    "🏃🏿‍♀️‍➡️": "a woman running with dark skin tone, facing right",
    "👨‍👩‍👧‍👦": "a family of a man, a woman, a girl and a boy",
    "👨‍👨‍👦‍👦": "a family of two men and two boys",
    "👩🏻‍❤️‍💋‍👨🏿": "a woman and a man kissing, one with light and one with dark skin tone",
    "👭": "two women holding hands",
    "🇫🇷": "the flag of France",
    "🇳🇱": "the flag of the Netherlands",
    "🇲🇲": "the flag of Myanmar",
    "🏴󠁧󠁢󠁳󠁣󠁴󠁿": "the flag of Scotland",
    "5️⃣": "a keycap with the number 5",
    "*️⃣": "a keycap with an asterisk",
    "🕣": "a clock showing half past eight",
    "🕐": "a clock showing one o'clock",
    "❤️": "a red heart",
    "🟩": "a green square",
    "🟠": "an orange circle",
    "🩵": "a light blue heart",
    "🍴": "a fork and a knife",
    "😷": "a face with a medical mask",
    "😂": "a face with tears of joy",
    "🦄": "a unicorn",
    "⌛": "an hourglass done",
    "👖": "jeans",
    "🍞": "bread",
    "🚭": "a sign for no smoking",
    "♌": "the zodiac sign Leo",
    "🗽": "the Statue of Liberty",
    "👞": "a man's shoe",
    "🐪": "a camel",
}


@pytest.fixture(scope="module")
def drawings() -> dict[str, OpenMoji]:
    """By character, with or without the selector that asks for colours: OpenMoji's file names vary."""
    return {drawing.emoji.replace(SELECTOR, ""): drawing for drawing in load_drawings()[0]}


@pytest.mark.parametrize("character", CAPTIONS)
def test_caption(drawings: dict[str, OpenMoji], character: str) -> None:
    assert drawings[character.replace(SELECTOR, "")].caption == CAPTIONS[character]


@pytest.mark.parametrize(
    ("character", "attributes"),
    [
        ("👩🏽‍⚕️", {"role": "health worker", "gender": "woman", "skin_tone": "medium", "hair": None, "count": "1"}),
        ("🧑🏽‍⚕️", {"role": "health worker", "gender": None, "skin_tone": "medium", "count": "1"}),
        ("👨🏿‍🦱", {"role": "person", "gender": "man", "skin_tone": "dark", "hair": "curly hair"}),
        ("🏃🏿‍♀️‍➡️", {"role": "running", "gender": "woman", "skin_tone": "dark"}),
        ("👩🏻‍❤️‍💋‍👨🏿", {"role": "kiss", "gender": "mixed", "skin_tone": "light and dark", "count": "2"}),
        ("💏", {"role": "kiss", "count": "2"}),
        ("👫", {"role": "holding hands", "count": "2"}),
        ("🤼", {"role": "wrestling", "count": "2"}),
        ("👨‍👦", {"role": None, "count": "2"}),
        ("👨‍👩‍👦", {"count": "3"}),
        ("👩‍👩‍👧‍👦", {"count": "4"}),
        ("😚", {"role": None, "count": None}),  # a kissing face
        ("🤱", {"role": "feeding baby", "gender": "woman", "count": None}),
        ("👍", {"role": "thumbs up", "skin_tone": None, "count": None}),
        ("❤️", {"role": None, "colour": "red", "shape": "heart"}),
        ("◼️", {"colour": "black", "shape": "square"}),
        ("🔷", {"colour": "blue", "shape": "diamond"}),
        ("🔲", {"colour": None, "shape": None}),  # a button
        ("🍕", {"role": None, "gender": None, "colour": None, "shape": None}),
    ],
)
def test_attributes(drawings: dict[str, OpenMoji], character: str, attributes: dict[str, str | None]) -> None:
    assert {name: getattr(drawings[character.replace(SELECTOR, "")], name) for name in attributes} == attributes


def test_every_caption_is_plain_english_and_its_own(drawings: dict[str, OpenMoji]) -> None:
    captions = [drawing.caption for drawing in drawings.values()]
    assert len(set(captions)) == len(captions)
    for caption in captions:
        assert not set("_:()’&") & set(caption), caption
        assert "  " not in caption
        assert caption == caption.strip()


def test_attributes_come_from_closed_sets_and_stand_in_the_caption(drawings: dict[str, OpenMoji]) -> None:
    for drawing in drawings.values():
        assert drawing.hair is None or drawing.hair in HAIRS
        assert (drawing.colour is None) == (drawing.shape is None)
        assert drawing.colour is None or drawing.colour in COLOURS
        assert drawing.shape is None or drawing.shape in SHAPES
        for tone in (drawing.skin_tone or "").split(" and "):
            assert tone in {"", *SKIN_TONES}
            assert tone in drawing.caption
        for value in (drawing.hair, drawing.colour, drawing.shape):
            assert value is None or value in drawing.caption


def test_left_out_drawings_are_counted() -> None:
    drawings, left_out = load_drawings()
    assert len(drawings) + left_out.total() == 4495
    assert left_out == {
        "no Unicode name (OpenMoji's own extras)": 542,
        "drawn without the skin tones that the name states": 40,
    }
    # What is left out: two people of two skin tones, drawn in yellow.
    emoji = {drawing.emoji for drawing in drawings}
    assert "🧑🏻‍🐰‍🧑🏿" not in emoji
    assert "👯" in emoji
