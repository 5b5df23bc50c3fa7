"""What the site does beside MkDocs: equations as MathML, and pages for the files of the repository that pages link to.

The same Markdown reads well on a code host: fences named `math`, inline $`…`$, and relative links such as
`../platform/unclip/diffusion/guidance.py#classifier_free`. A file or a name in it that is not there ends the build.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[2]
CONTRIBUTING = "CONTRIBUTING.md"
_FENCE = re.compile(r"^([ \t]*(`{3,}|~{3,}).*?^[ \t]*\2[ \t]*$)", re.MULTILINE | re.DOTALL)
_MATH = re.compile(r"\$`([^`]+)`\$")
_LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]+)(?:#([\w.-]+))?(?=\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml", ".sh": "sh"}


def on_config(config: MkDocsConfig) -> None:
    fence = {"name": "math", "class": "math", "format": _display}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds CONTRIBUTING.md, and a page for every file of the repository that some page links to."""
    own = (REPOSITORY / CONTRIBUTING).read_text(encoding="utf-8")
    files.append(File.generated(config, CONTRIBUTING.lower(), content=_as_in_docs(own)))
    linked = set[str]()
    for file in files.documentation_pages():
        links = _LINK.finditer(file.content_string)
        linked |= {name for match in links if (name := _outside(match[1], file.src_uri)) is not None}
    for name in sorted(linked - {CONTRIBUTING}):
        files.append(File.generated(config, _page_of(name), content=_shown(name)))


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Turns inline equations into MathML and links out of docs/ into links to the pages made of those files."""
    own = page.file.src_uri
    if own.startswith("source/"):
        return markdown
    return _outside_fences(markdown, lambda text: _LINK.sub(lambda m: _target(m, own), _MATH.sub(_inline, text)))


def _as_in_docs(text: str) -> str:
    """A page of the repository's root with its links as they are from docs/."""
    return re.sub(r"(?<=\]\()(?!https?:|#)(docs/)?", lambda match: "" if match[1] else "../", text)


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """The text with `change` made to all but fenced blocks."""
    parts = _FENCE.split(markdown)  # text, fence, its ticks, text, …
    return "".join(change(part) if i % 3 == 0 else part for i, part in enumerate(parts) if i % 3 != 2)


def _outside(link: str, page: str) -> str | None:
    """The file of the repository that a page of docs/ links to; None for a link within docs/."""
    name = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if name.startswith("docs/") else name


def _target(match: re.Match[str], page: str) -> str:
    name, anchor = _outside(match[1], page), match[2]
    if name is None:
        return match[0]
    if anchor is not None and name != CONTRIBUTING:
        anchor = f"__codelineno-0-{_line(name, anchor)}"
    return posixpath.relpath(_page_of(name), posixpath.dirname(page) or ".") + (f"#{anchor}" if anchor else "")


def _page_of(name: str) -> str:
    return name.lower() if name == CONTRIBUTING else f"source/{name}.md"


def _shown(name: str) -> str:
    path = REPOSITORY / name
    if not path.is_file():
        raise PluginError(f"{name} is linked to, but there is no such file")
    language, text = _LANGUAGES.get(path.suffix, "text"), path.read_text(encoding="utf-8")
    return f'---\nsearch:\n  exclude: true\n---\n# {name}\n\n``````{language} linenums="1"\n{text}\n``````\n'


def _line(name: str, symbol: str) -> int:
    """The line where a Python file defines `symbol`, a class or function or `Class.method`, or assigns to it."""
    found = _definitions(REPOSITORY / name).get(symbol)
    if found is None:
        raise PluginError(f"{name}#{symbol} is linked to, but the file does not define it")
    return found


@cache
def _definitions(path: Path) -> dict[str, int]:
    return dict(_defined(ast.parse(path.read_text(encoding="utf-8")), ""))


def _defined(owner: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    for node in ast.iter_child_nodes(owner):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield prefix + node.name, node.lineno
            yield from _defined(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from ((prefix + target.id, node.lineno) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id, node.lineno


def _display(source: str, *_: object, **__: object) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'


def _inline(match: re.Match[str]) -> str:
    equation = convert(match[1]).replace("*", "&#42;").replace("_", "&#95;")  # which Markdown would read as emphasis
    return f'<span class="math">{equation}</span>'  # a line that began with <math> would be a block of HTML
