"""The playground's files over HTTP, out of the package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from unclip.serving.api.routes.playground import playground_router
from unclip.serving.errors import ApiError

FOLDER = resources.files("unclip.serving") / "playground"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    app.include_router(playground_router())
    with TestClient(app) as client:
        yield client


def test_page_is_the_packages_file(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == (FOLDER / "index.html").read_bytes()


@pytest.mark.parametrize(
    ("suffix", "media_type"), [("js", "text/javascript"), ("css", "text/css"), ("svg", "image/svg+xml")]
)
def test_every_file_has_its_type(client: TestClient, suffix: str, media_type: str) -> None:
    paths = [path for path in FOLDER.iterdir() if path.name.endswith(f".{suffix}")]
    assert paths
    for path in paths:
        answer = client.get(f"/playground/{path.name}")
        assert answer.status_code == 200, path.name
        assert answer.headers["content-type"].partition(";")[0] == media_type
        assert answer.content == path.read_bytes()


def test_policy_allows_nothing_inline_or_foreign(client: TestClient) -> None:
    policy = dict(part.split(maxsplit=1) for part in client.get("/").headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    page = client.get("/").text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)


def test_files_name_no_other_host() -> None:
    for path in FOLDER.iterdir():
        foreign = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text().replace("http://www.w3.org/2000/svg", ""))
        assert not foreign, path.name


def test_browsers_copy_is_good_until_the_file_changes(client: TestClient) -> None:
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"If-None-Match": f'"old", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert client.get("/", headers={"If-None-Match": '"old"'}).status_code == 200
    assert client.get("/playground/app.js").headers["etag"] != first.headers["etag"]


def test_head_has_no_body(client: TestClient) -> None:
    answer = client.head("/")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) == len((FOLDER / "index.html").read_bytes())


@pytest.mark.parametrize("name", ["none.js", "..%2fconfig.py", "%2e%2e%2fconfig.py", "__init__.py"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/playground/{name}").status_code == 404


def test_page_is_not_part_of_the_api(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}
