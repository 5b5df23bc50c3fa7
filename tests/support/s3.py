"""An S3-compatible server of our own, reached over HTTP through a proxy that can disturb it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from moto.server import ThreadedMotoServer
from tests.support.faults import FaultyProxy

from unclip.utils.s3 import connection

BUCKET = "bucket"


@dataclass(frozen=True)
class ObjectStore:
    """`uri` is a bucket; `proxy` stands between every client and the server at `server_url`."""

    uri: str
    proxy: FaultyProxy
    server_url: str


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A running store, found through the environment by this process and those it starts."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with FaultyProxy(host, port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in (settings | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        connection().makedirs(BUCKET, exist_ok=True)  # servers of one process share what they hold
        yield ObjectStore(f"s3://{BUCKET}", proxy, f"http://{host}:{port}")
    server.stop()
