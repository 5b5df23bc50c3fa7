"""The site: it is built without a broken link, and a broken one ends the build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from tests.support.docs import REPOSITORY


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build(load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(out), strict=True))
    return out


def test_every_page_is_there(site: Path) -> None:
    """The build itself has checked links, anchors and what pages fetch: see docs/site/links.py."""
    pages = {path.relative_to(REPOSITORY / "docs").with_suffix(".html") for path in (REPOSITORY / "docs").rglob("*.md")}
    assert {path for path in pages if not (site / path).is_file()} == set()
    assert "proof" in (site / "contributing.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation() -> None:
    nav = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"[\w/]+\.md", nav))
    pages = {str(path.relative_to(REPOSITORY / "docs")) for path in (REPOSITORY / "docs").rglob("*.md")}
    assert listed == pages | {"contributing.md"}


def test_the_readme_leads_somewhere() -> None:
    """Its links are the only ones that the site does not hold."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    links = [address for pair in found for address in pair if address and not address.startswith("http")]
    assert len(links) > 10
    for link in links:
        name, _, anchor = link.partition("#")
        target = REPOSITORY / name
        assert target.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slugify(heading, "-") for heading in headings}, link


def test_equations_are_mathml_and_code_is_linked(site: Path) -> None:
    page = (site / "science" / "guidance.html").read_text(encoding="utf-8")
    assert page.count('display="block"') == 3
    assert re.search(
        r'<p><span class="math"><math [^>]*display="inline">', (site / "science" / "prior.html").read_text()
    )
    assert "```" not in page
    assert "$`" not in page
    target = re.search(
        r'href="\.\./(source/[^"#]+guidance\.py\.html)#(__codelineno-0-\d+)"><code>classifier_free', page
    )
    assert target is not None
    source = (site / target[1]).read_text(encoding="utf-8")
    line = source[source.index(f'id="{target[2]}"') :].partition("\n")[0]
    assert "classifier_free" in re.sub(r"<[^>]+>", "", line)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[gone](gone.html)", "index.html leads to gone.html: no such file"),
        ("[here](#nowhere)", "leads to #nowhere: no such anchor"),
        ("[code](../platform/unclip/diffusion/guidance.py#no_such_name)", "does not define it"),
        ("[code](../platform/unclip/no_such_file.py)", "no such file"),
        ('<img src="https://example.com/a.png">', "index.html fetches https://example.com/a.png"),
        ('<script src="//example.com/a.js"></script>', "index.html fetches //example.com/a.js"),
    ],
)
def test_what_is_broken_ends_the_build(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, reason: str
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Page\n\n{text}\n", encoding="utf-8")
    settings = {"docs_dir": str(docs), "site_dir": str(tmp_path / "site"), "nav": ["index.md"]}
    with pytest.raises(Abort):
        build(load_config(str(REPOSITORY / "mkdocs.yml"), **settings))
    assert reason in caplog.text
