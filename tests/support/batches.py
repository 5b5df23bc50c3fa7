"""The real app with batches, over HTTP on loopback; and a runner that works them off in threads of this process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from openai import OpenAI
from openai.types import Batch
from tests.support.serving import tiny_service

from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.job import BulkJob
from unclip.generation.bulk.maker import PictureMaker
from unclip.serving.api.app import create_app
from unclip.serving.batches import Batches, BatchRunner
from unclip.serving.batches.folder import BatchFolder
from unclip.serving.batches.work import BatchWork
from unclip.serving.config import ServeConfig
from unclip.serving.observe.meters import MemoryMeters
from unclip.serving.pictures.encoding import Encoder

_PATIENCE_S = 60.0
OVER = ("completed", "failed", "cancelled", "expired")


class ThreadRunner:
    """Works batches off in threads.

    Args:
        before_unit: called before each unit of the bulk job; what it raises ends an attempt.
    """

    def __init__(self, folder: str, before_unit: Callable[[], None] = lambda: None) -> None:
        self.folder, self.before_unit = BatchFolder(folder), before_unit
        self.started: list[str] = []
        self.threads: dict[str, threading.Thread] = {}
        self._one_at_a_time = threading.Lock()  # as names of actors are given once
        self.makings: list[ThreadMaking] = []

    def start(self, batch_id: str) -> None:
        with self._one_at_a_time:
            if batch_id not in self.threads or not self.threads[batch_id].is_alive():
                self.started.append(batch_id)
                self.threads[batch_id] = threading.Thread(target=self.work, args=[batch_id])
                self.threads[batch_id].start()

    def work(self, batch_id: str) -> None:
        BatchWork(self.folder, batch_id, self._making, Encoder(None)).run()

    def _making(self, job: GenerateConfig) -> ThreadMaking:
        self.makings.append(ThreadMaking(job, self.before_unit))
        return self.makings[-1]


class ThreadMaking:
    """The bulk job in a thread."""

    def __init__(self, job: GenerateConfig, before_unit: Callable[[], None]) -> None:
        self.stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._make, args=[job, before_unit])
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        self._thread.join(min(seconds, 0.05))
        if self._error is not None and not self._thread.is_alive():
            raise self._error
        return not self._thread.is_alive()

    def stop(self) -> None:
        self.stopped.set()
        self._thread.join()

    def _make(self, config: GenerateConfig, before_unit: Callable[[], None]) -> None:
        try:
            job = BulkJob.prepare(config)
            units = job.begin()
            maker = PictureMaker(job.config)
            maker.setup()
            try:
                for unit in units:
                    before_unit()
                    if self.stopped.is_set():
                        return
                    maker.process(unit)
            finally:
                maker.close()
            job.finish()
        except BaseException as error:
            self._error = error


@contextmanager
def running_batches(config: ServeConfig, runner: BatchRunner) -> Iterator[str]:
    """The server's address while the block runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        servers: list[uvicorn.Server | BaseException] = []
        ready = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(_serve(config, runner, listener, servers, ready)))
        thread.start()
        try:
            assert ready.wait(_PATIENCE_S)
            [server] = servers
            if isinstance(server, BaseException):
                raise server
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            server.should_exit = True
        finally:
            for server in servers:
                if isinstance(server, uvicorn.Server):
                    server.should_exit = True
            thread.join(_PATIENCE_S)
            assert not thread.is_alive()


async def _serve(
    config: ServeConfig,
    runner: BatchRunner,
    listener: socket.socket,
    servers: list[uvicorn.Server | BaseException],
    ready: threading.Event,
) -> None:
    try:
        service, group = await tiny_service(config, MemoryMeters())
    except BaseException as error:
        servers.append(error)
        ready.set()
        return
    batches = Batches(config, runner, models=service.models, policy=service.policy)
    app = create_app(service, batches=batches)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
    servers.append(server)
    ready.set()
    try:
        async with batches.running():
            await server.serve(sockets=[listener])
    finally:
        await group.close(5.0)


def client_of(url: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/images/generations", "body": body}


def submit(client: OpenAI, lines: Sequence[Mapping[str, Any]], **fields: Any) -> Batch:
    content = "".join(json.dumps(each) + "\n" for each in lines).encode()
    file = client.files.create(file=("list.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h", **fields
    )


def wait_for(client: OpenAI, batch_id: str, until: Callable[[Batch], bool] | None = None) -> Batch:
    """The batch once it is over, or as far as is wanted."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if until(batch) if until else batch.status in OVER:
            return batch
        time.sleep(0.05)
    raise AssertionError(f"batch is still {batch.status}: {batch}")


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """Of an output file; none where there is none."""
    if file_id is None:
        return []
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
