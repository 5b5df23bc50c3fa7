"""The last step of a build: every link has its target, every anchor is there, and no page fetches anything from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

_FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
"""Attributes of tags whose address a browser opens by itself; of others it does when somebody clicks."""
_CSS_ADDRESS = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")


def on_post_build(config: MkDocsConfig) -> None:
    problems = list(find_problems(Path(config.site_dir)))
    if problems:
        raise PluginError("\n".join(["the site has broken links:", *problems]))


def find_problems(site: Path) -> Iterator[str]:
    """A line for each target that is not there, with one page that leads to it, and for each asset from elsewhere."""
    site = site.resolve()
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    missing: dict[str, str] = {}
    for path, page in pages.items():
        own = str(path.relative_to(site))
        yield from (f"{own} fetches {address}" for address in page.fetched if urlsplit(address).netloc)
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                missing.setdefault(f"leads to {address}: no such file", own)
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                missing.setdefault(f"leads to {address}: no such anchor", own)
    yield from (f"{own} {problem}" for problem, own in missing.items())
    for path in sorted(site.rglob("*.css")):
        remote = _CSS_ADDRESS.findall(path.read_text(encoding="utf-8"))
        yield from (f"{path.relative_to(site)} fetches {address}" for address in remote)


class _Page(HTMLParser):
    """The anchors of a page, all addresses in it, and of these the ones that a browser fetches by itself."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.addresses: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.addresses += [values[name] for name in ("href", "src") if name in values]
        if values.get(_FETCHED.get(tag, "")) and values.get("rel") != "canonical":
            self.fetched.append(values[_FETCHED[tag]])
