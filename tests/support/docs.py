"""The code blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHELLS = ("sh", "bash")
LANGUAGES = (*SHELLS, "console", "python", "yaml", "json", "math", "")
"""What a fence may be named. `console` has `$` before its commands and their output; a fence without a name is plain text."""

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[^\s`]*).*?\n(?P<text>.*?)^ *(?P=ticks) *$", re.M | re.S
)
_INLINE = re.compile(r"(?<!`)`((?:python|ray|serve|kubectl|make) [^`\n]+)`(?!`)")
_SNIPPET = re.compile(r'^--8<-- "([^":]+)(?::([\w-]+))?"$', re.M)
_NAMES = (("ray", "job", "submit"), ("serve", "run"), ("serve", "deploy"), ("serve", "status"))
"""What running text calls commands by, without their arguments."""
_SUBSTITUTION = re.compile(r"\$\([^()]*\)")
_OPERATORS = frozenset("|&;<>()")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """The words of one command, and where it stands."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """Every page that people read."""
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, name = page.read_text(encoding="utf-8"), str(page.relative_to(REPOSITORY))
    return [
        Block(name, text.count("\n", 0, match.start("text")) + 1, match["language"], _dedented(match))
        for match in _FENCE.finditer(text)
    ]


def _dedented(match: re.Match[str]) -> str:
    return re.sub(rf"^ {{0,{len(match['indent'])}}}", "", match["text"], flags=re.M)


def named_files(page: Path) -> dict[str, str]:
    """The YAML blocks of a page whose first line is a comment with a file's name."""
    found = {}
    for block in blocks(page):
        name = re.match(r"# ([\w./-]+\.yaml)$", block.text.partition("\n")[0])
        if block.language == "yaml" and name:
            found[name[1]] = block.text
    return found


def with_snippets(text: str) -> str:
    """The text with what it includes of other files."""
    return _SNIPPET.sub(lambda match: snippet(match[1], match[2]), text)


def snippet(file: str, section: str | None) -> str:
    """A file of the repository, or its lines between `--8<-- [start:SECTION]` and `[end:SECTION]`."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    if section is None:
        return text
    start, end = (text.index(f"# --8<-- [{edge}:{section}]") for edge in ("start", "end"))
    return text[text.index("\n", start) + 1 : end]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block of shell lines; nothing of other blocks."""
    if block.language == "console":
        lines = [line[2:] if line.startswith("$ ") else "" for line in block.text.splitlines()]
    elif block.language in SHELLS:
        lines = block.text.splitlines()
    else:
        return
    number = 0
    while number < len(lines):
        first, line = number, lines[number]
        while line.endswith("\\") or _is_open(line):
            number += 1
            line = line.removesuffix("\\") + ("" if line.endswith("\\") else "\n") + lines[number]
        number += 1
        for words in split(line):
            yield Command(f"{block.page}:{block.line + first}", words)


def inline_commands(page: Path) -> Iterator[Command]:
    """Commands in running text: code that begins with the name of a program that we know."""
    text = page.read_text(encoding="utf-8")
    outside = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in _INLINE.finditer(outside):
        place = f"{page.relative_to(REPOSITORY)}:{outside.count(chr(10), 0, match.start()) + 1}"
        for words in split(match[1]):
            if words not in _NAMES:
                yield Command(place, words)


def split(line: str) -> Iterator[tuple[str, ...]]:
    """The simple commands of a shell line, without comments, redirections and what they are joined by."""
    lexer = shlex.shlex(_SUBSTITUTION.sub("SUBSTITUTED", line), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    skips = False
    for word in lexer:
        if set(word) <= _OPERATORS:
            skips = set(word) <= {"<", ">"}
            if not skips:
                yield from [tuple(words)] if words else []
                words = []
        elif skips:
            skips = False
        else:
            words.append(word)
    if words:
        yield tuple(words)


def _is_open(line: str) -> bool:
    """Whether a quote of the line goes on in the next one."""
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False
