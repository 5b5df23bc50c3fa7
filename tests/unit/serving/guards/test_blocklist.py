"""What a blocklist finds, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclip.config.base import ConfigError
from unclip.serving.guards.blocklist import Blocklist

LISTED = Blocklist(
    {1: "ass", 2: "Bad Thing", 3: "Größe", 4: "naïve café", 5: "hell", 6: "裸体", 7: "anus", 8: "C-4 bomb"}
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("ass", 1),
        ("An ASS!", 1),
        ("(ass)", 1),
        ("ａｓｓ", 1),  # fullwidth
        ("𝐚𝐬𝐬", 1),  # mathematical
        ("a.s.s", 1),
        ("a-s_s here", 1),
        ("a s s", 1),
        ("such a a s s", 1),
        ("a\u200bs\u00ads", 1),  # nothing to see between them
        ("ás̈š", 1),
        ("end.ass", 1),
        ("a bad thing", 2),
        ("BAD\nTHING", 2),
        ("bad - thing", 2),
        ("badthing", 2),
        ("b a d thing", 2),
        ("b a d t h i n g", 2),
        ("b.a.d t.h.i.n.g", 2),
        ("die GRÖSSE", 3),
        ("große? grösse", 3),
        ("NAIVE CAFE", 4),
        ("裸体の絵", 6),
        ("大裸 体画", 6),
        ("the c4 bomb", 8),
        ("C 4 BOMB", 8),
    ],
)
def test_finds(text: str, line: int) -> None:
    assert LISTED.find(text) == line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "!?",
        "a class of bass players in grass",
        "assassin",
        "bad, but no such thing",
        "thing bad",
        "she'll say he'll come, and we’ll see",
        "show an us flag",
        "as silver as sand",
        "as so",
        "grosse",
        "a bomb",
        "shell",
        "裸の体",
        "🙂 👩‍🚀",
    ],
)
def test_leaves_alone(text: str) -> None:
    assert Blocklist({1: "ass", 2: "bad thing", 5: "hell", 6: "裸体", 7: "anus", 8: "C-4 bomb"}).find(text) is None


@given(
    st.text(st.sampled_from("bcdfgh"), min_size=2, max_size=8),
    st.sampled_from([" ", ".", "-", "_", "\u200b", " . ", "*"]),
)
def test_a_word_is_found_however_it_is_spaced_out(word: str, between: str) -> None:
    assert Blocklist({9: word}).find(f"draw {between.join(word.upper())}, please") == 9


@given(st.text(max_size=60))
def test_any_text_that_is_listed_is_found_in_itself(text: str) -> None:
    try:
        listed = Blocklist({3: text})
    except ConfigError:
        return
    assert listed.find(text) == 3
    assert listed.find(f"before, {text}; behind") == 3


def test_the_file(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("\ufeff# not allowed\n\nbad thing\r\n  ugly  \n", encoding="utf-8")
    listed = Blocklist.load(str(file))
    assert [listed.find(text) for text in ("bad thing", "ugly", "not allowed", "good")] == [3, 4, None, None]


def test_broken_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    with pytest.raises(ConfigError, match=r"policy\.blocklist = .*list\.txt': cannot be read"):
        Blocklist.load(str(file))
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="cannot be read"):
        Blocklist.load(str(file))
    file.write_text("good\n--\n")
    with pytest.raises(ConfigError, match="line 2: '--' has neither letters nor digits"):
        Blocklist.load(str(file))


def test_long_lists_and_long_texts() -> None:
    """Phrases that begin alike cost no more than one."""
    listed = Blocklist({number: f"word {'and ' * 50} {number}" for number in range(1, 3000)})
    text = f"word {'and ' * 50}" * 200
    assert listed.find(text) is None
    assert listed.find(f"{text} 77") == 77
