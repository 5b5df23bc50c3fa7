"""The real app with real small weights, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import uvicorn
from PIL import Image

from unclip.pipelines.stages import StageName
from unclip.serving.api.app import create_app
from unclip.serving.config import STAGES, ServeConfig
from unclip.serving.drawing.service import Service, build_service
from unclip.serving.observe.meters import MemoryMeters
from unclip.serving.stages.chain import Chain
from unclip.serving.stages.group import LocalGroup
from unclip.serving.stages.model import Model, Models

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class RunningApp:
    """A server that answers at `url`, and what it is made of."""

    url: str
    service: Service
    group: LocalGroup
    meters: MemoryMeters
    loop: asyncio.AbstractEventLoop


@contextmanager
def running_app(config: ServeConfig) -> Iterator[RunningApp]:
    """The server of `config` in one process: all stages, a thread for HTTP; it has ended after the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        running: list[RunningApp | BaseException] = []
        ready, server = threading.Event(), _Server()
        thread = threading.Thread(target=lambda: asyncio.run(_serve(config, listener, server, running, ready)))
        thread.start()
        try:
            assert ready.wait(_PATIENCE_S), "the server did not start"
            [found] = running
            if isinstance(found, BaseException):
                raise found
            yield found
        finally:
            server.end()
            thread.join(_PATIENCE_S)
            assert not thread.is_alive(), "the server did not end"


async def tiny_service(config: ServeConfig, meters: MemoryMeters) -> tuple[Service, LocalGroup]:
    """The service of this event loop; the group has to be closed."""
    group = LocalGroup(config, STAGES, meters=meters)
    await group.load(config.bundle)
    models = Models(Model.load(config.bundle, config.options))
    chain = Chain([(STAGES, group)], models, meters=meters)
    return build_service(config, chain, models, meters=meters, checks=[group.check_health]), group


class _Server:
    """Uvicorn, which may be told to end before it has begun."""

    def __init__(self) -> None:
        self._server: uvicorn.Server | None = None
        self._ended = False

    async def run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self._server = server
        if not self._ended:
            await server.serve(sockets=[listener])

    def end(self) -> None:
        self._ended = True
        if self._server is not None:
            self._server.should_exit = True


async def _serve(
    config: ServeConfig,
    listener: socket.socket,
    server: _Server,
    running: list[RunningApp | BaseException],
    ready: threading.Event,
) -> None:
    try:
        meters = MemoryMeters()
        service, group = await tiny_service(config, meters)
    except BaseException as error:
        running.append(error)
        ready.set()
        return
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running.append(RunningApp(url, service, group, meters, asyncio.get_running_loop()))
    app = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, timeout_graceful_shutdown=5))
    listener.listen()
    asyncio.get_running_loop().call_later(0.01, ready.set)
    try:
        await server.run(app, listener)
    finally:
        await group.close(5.0)


def picture_of(answer: Any) -> npt.NDArray[np.uint8]:
    """uint8 (H, W, 3) of one of the `data` of an answer, or of an event, as the client has it."""
    return decoded(base64.b64decode(answer.b64_json))


def decoded(content: bytes) -> npt.NDArray[np.uint8]:
    """uint8 (H, W, 3) of a file."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def png_of(picture: npt.NDArray[np.uint8], keep: npt.NDArray[np.bool_] | None = None) -> bytes:
    """A PNG file of uint8 (H, W, 3), transparent where it is not to be kept."""
    alpha = [] if keep is None else [np.where(keep, 255, 0).astype(np.uint8)[..., None]]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([picture, *alpha], axis=2)).save(buffer, format="PNG")
    return buffer.getvalue()


@contextmanager
def held_up(app: RunningApp, stage: StageName = "decoder") -> Iterator[HeldUp]:
    """The steps of a stage wait, from the next one on, until they are let go."""
    revision = app.group._revisions.current
    assert revision is not None
    held = HeldUp()
    hook = revision.stages.networks[stage].register_forward_pre_hook(lambda *_: held.step())
    try:
        yield held
    finally:
        held.let_go()
        hook.remove()


class HeldUp:
    """Counts the steps of a network, each of which waits at its beginning."""

    def __init__(self) -> None:
        self.steps = 0
        self._reached, self._going = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def step(self) -> None:
        """On the engine's thread."""
        self.steps += 1
        self._reached.set()
        assert self._going.wait(_PATIENCE_S)
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        """Until a step waits."""
        assert self._reached.wait(_PATIENCE_S), "no step was taken"

    def let_go(self) -> None:
        """All steps, from now on."""
        self._going.set()


def wait_until(condition: Callable[[], bool]) -> None:
    """Until it holds; `AssertionError` after a minute."""
    ends = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, "it never came to be"
        time.sleep(0.005)
