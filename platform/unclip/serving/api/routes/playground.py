"""The playground: a page for people, out of the package's own files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Self

from fastapi import APIRouter, Request
from fastapi.responses import Response

from unclip.serving.errors import NotFound

_MEDIA_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_HEADERS = {
    # The page's own files and API, and the pictures that it holds in memory; nothing of other hosts, nothing inline.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Browsers keep the files, and ask with their ETag whether they are still good: a new version shows at once.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    headers: Mapping[str, str]

    @classmethod
    def read(cls, path: Traversable) -> Self:
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        return cls(content, _MEDIA_TYPES[path.name.rpartition(".")[2]], {**_HEADERS, "ETag": etag})

    def answer(self, request: Request) -> Response:
        """The file, or a word that the browser's copy of it is still good."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
        if self.headers["ETag"] in known:
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers, media_type=self.media_type)


def playground_router() -> APIRouter:
    """`GET /` and `/playground/{name}`, for everybody: the page holds no secrets, and asks for the API key itself.

    The files are read once. Names that are none of them raise `NotFound`.
    """
    router = APIRouter(include_in_schema=False)
    folder = resources.files("unclip.serving") / "playground"
    files = {path.name: _File.read(path) for path in folder.iterdir() if path.name.rpartition(".")[2] in _MEDIA_TYPES}

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return files["index.html"].answer(request)

    @router.api_route("/playground/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFound(f"There is no file {name!r} of the playground.")
        return files[name].answer(request)

    return router
