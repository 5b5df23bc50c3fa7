"""Words and phrases in texts, whatever their case, accents, punctuation and spacing: whole words, so "class" is not "ass"."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from unclip.config.base import ConfigError
from unclip.utils import storage

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""Beginnings of the Unicode names of letters of scripts that put no spaces between words."""
_SINGLE_WORDS = "ai"
"""Letters that are words of their own, as in "such a b a d thing"."""
_SILENT = ("Mn", "Me", "Cf")
"""Accents, frames around letters, and characters without a shape, as soft hyphens and zero-width joiners."""


class Blocklist:
    """Finds listed phrases.

    Texts are compared after Unicode's NFKC and case folding, without accents and invisible characters. Punctuation inside of a
    word counts for nothing (b.a-d), nor do spaces where each letter stands alone (b a d). Phrases of scripts without spaces are
    found inside of other words, too. Endings, misspellings, digits for letters and look-alikes of other scripts are not known:
    list them, and see the concepts.

    Args:
        phrases: line numbers, for the audit log, and phrases.

    Raises `ConfigError` for a phrase without letters or digits.
    """

    def __init__(self, phrases: Mapping[int, str]) -> None:
        self._spaced = _Node()
        self._unspaced: dict[str, int] = {}
        for line, phrase in phrases.items():
            folded = _folded(phrase)
            letters = "".join(_words(folded))
            if not letters:
                raise ConfigError(f"policy.blocklist: line {line}: {phrase!r} has neither letters nor digits")
            if any(map(_is_unspaced, letters)):
                self._unspaced.setdefault(letters, line)
            else:
                for words in ([letters], *_readings(folded)):
                    self._spaced.add(words, line)

    @classmethod
    def load(cls, uri: str) -> Blocklist:
        """Of a UTF-8 text file with a phrase a line; empty lines, and those that begin with #, say nothing."""
        try:
            lines = storage.read_bytes(uri).decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"policy.blocklist = {uri!r}: cannot be read: {reason}") from None
        said = {number: line.strip() for number, line in enumerate(lines, 1)}
        return cls({number: line for number, line in said.items() if line and not line.startswith("#")})

    def find(self, text: str) -> int | None:
        """The line of a phrase that the text contains; None where it contains none."""
        folded = _folded(text)
        for words in _readings(folded):
            for start in range(len(words)):
                line = self._spaced.first(words, start)
                if line is not None:
                    return line
        letters = "".join(_words(folded)) if self._unspaced else ""
        return next((line for part, line in self._unspaced.items() if part in letters), None)


@dataclass
class _Node:
    """Phrases by their first word, those by their second, ...; `line` is that of the phrase which ends here."""

    following: dict[str, _Node] = field(default_factory=dict)
    line: int | None = None

    def add(self, words: Sequence[str], line: int) -> None:
        node = self
        for word in words:
            node = node.following.setdefault(word, _Node())
        node.line = line if node.line is None else node.line

    def first(self, words: Sequence[str], start: int) -> int | None:
        """The line of the shortest phrase that begins with the word at `start`."""
        node = self
        for index in range(start, len(words)):
            found = node.following.get(words[index])
            if found is None or found.line is not None:
                return None if found is None else found.line
            node = found
        return None


def _folded(text: str) -> str:
    """Case, width, accents and invisible characters gone; casefolding may undo NFKC, so it is done before and after."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = (letter for letter in unicodedata.normalize("NFKD", folded) if unicodedata.category(letter) not in _SILENT)
    return "".join(kept)


def _words(folded: str) -> list[str]:
    return re.findall(r"[^\W_]+", folded)


def _readings(folded: str) -> Iterator[list[str]]:
    """The words of a text as it may be meant: divided by all that is no letter; by spaces and apostrophes alone, with what else
    stands inside of a word left out; and with letters that stand alone put together."""
    words = _words(folded)
    yield words
    yield ["".join(_words(part)) for part in re.split(r"[\s'’]+", folded) if _words(part)]
    runs = [(alone, list(run)) for alone, run in groupby(words, key=lambda word: len(word) == 1)]
    if any(alone and len(run) > 1 for alone, run in runs):
        yield [word for alone, run in runs for word in (["".join(run)] if alone else run)]
        yield [word for alone, run in runs for word in (_spelt(run) if alone else run)]


def _spelt(run: list[str]) -> list[str]:
    """Letters that stand alone as words, where the first is one by itself."""
    return [run[0], "".join(run[1:])] if run[0] in _SINGLE_WORDS else ["".join(run)]


def _is_unspaced(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(_UNSPACED)
