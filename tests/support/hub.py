"""A hub of our own on loopback: of the Hugging Face hub's HTTP API, what fetching a repository's files asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest


@dataclass
class Hub:
    """`repositories` are folders by `ORG/NAME`; `commits` name the one that is at each revision.

    fetched: the paths of all files that were sent, in order.
    """

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)

    def publish(self, repo: str, folder: Path, commit: str = "a" * 40) -> None:
        """Makes `folder` what `repo` is at `main`, at `v1` and at that commit."""
        self.repositories[repo] = folder
        self.commits |= {"main": commit, "v1": commit, commit: commit}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, *, send_body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) > 5:
            self._api("/".join(parts[2:4]), parts[4], parts[5], send_body=send_body)
        elif len(parts) > 4:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), send_body=send_body)
        else:
            self._missing("RepoNotFound")

    def _api(self, repo: str, what: str, revision: str, *, send_body: bool) -> None:
        commit, folder = self.hub.commits.get(revision), self.hub.repositories.get(repo)
        if folder is None or commit is None:
            self._missing("RepoNotFound" if folder is None else "RevisionNotFound")
            return
        files = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _etag(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        answer: object = files if what == "tree" else {"id": repo, "sha": commit, "siblings": []}
        self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"}, send_body=send_body)

    def _file(self, repo: str, revision: str, path: str, *, send_body: bool) -> None:
        found = self.hub.repositories[repo] / path
        if not found.is_file():
            self._missing("EntryNotFound")
            return
        if send_body:
            self.hub.fetched.append(path)
        headers = {"ETag": f'"{_etag(found)}"', "X-Repo-Commit": self.hub.commits[revision]}
        self._send(found.read_bytes(), headers, send_body=send_body)

    def _send(self, content: bytes, headers: dict[str, str], *, send_body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            self.wfile.write(content)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def running_hub(cache: Path) -> Iterator[Hub]:
    """A hub that this process takes for the real one, with an empty cache of its own."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, pytest.MonkeyPatch.context() as patch:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        pages = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        ours = pages.replace(huggingface_hub.constants.ENDPOINT, hub.url)
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", ours)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
