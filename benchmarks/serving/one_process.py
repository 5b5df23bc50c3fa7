"""The app and all stages in one process without Ray: `python -m benchmarks.serving.one_process CONFIG_JSON PORT`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from unclip.serving.api.app import create_app
from unclip.serving.config import STAGES, ServeConfig
from unclip.serving.drawing.service import build_service
from unclip.serving.observe.meters import MemoryMeters
from unclip.serving.stages.chain import Chain
from unclip.serving.stages.group import LocalGroup
from unclip.serving.stages.model import Model, Models

_START_S = 120.0


async def serve(config: ServeConfig, port: int) -> None:
    """Until the process is told to end."""
    meters = MemoryMeters()
    group = LocalGroup(config, STAGES, meters=meters)
    await group.load(config.bundle)
    models = Models(Model.load(config.bundle, config.options))
    chain = Chain([(STAGES, group)], models, meters=meters)
    service = build_service(config, chain, models, meters=meters, checks=[group.check_health])
    settings = uvicorn.Config(create_app(service), port=port, log_level="warning", access_log=False)
    await uvicorn.Server(settings).serve()
    await group.close(0.0)


@contextmanager
def running_in_one_process(config: ServeConfig, *, threads: int) -> Iterator[str]:
    """Its address, in a process of its own that computes with so many threads."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.serving.one_process", json.dumps(config.to_dict()), str(port)]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, process)
            yield url
        finally:
            process.terminate()


def free_port() -> int:
    """Of this machine's loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server at {url} did not start") from None
            time.sleep(0.2)
        else:
            return


if __name__ == "__main__":
    asyncio.run(serve(ServeConfig.from_dict(json.loads(sys.argv[1])), int(sys.argv[2])))
