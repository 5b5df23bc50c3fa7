"""A server from the command line: started, kept up until it is told to stop, and then drained."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from pydantic import Field
from ray import serve
from ray.serve import Application

from unclip.cluster import session
from unclip.cluster.failures import RunFailed, describe
from unclip.cluster.serve.application import DRAIN_S, INGRESS, application
from unclip.config.base import Config
from unclip.serving.config import RECIPES, ServeConfig

APPLICATION = "unclip"
"""Name of the application that the job runs."""


class HttpConfig(Config):
    """Where a server listens."""

    host: str = "127.0.0.1"
    """Address of the network interface; 0.0.0.0 for all of them, which is for machines that nobody else reaches or that
    have `keys`."""
    port: int = Field(8000, ge=1, le=65535)
    """TCP port."""


class ServerConfig(ServeConfig):
    """A server of one bundle that a job starts."""

    http: HttpConfig = HttpConfig()
    """Where it listens; a cluster whose Serve runs already keeps to what that was started with."""


def _with_http(recipe: Callable[[], ServeConfig]) -> ServerConfig:
    return ServerConfig.from_dict(recipe().to_dict())


SERVER_RECIPES: Mapping[str, Callable[[], ServerConfig]] = {
    name: partial(_with_http, recipe) for name, recipe in RECIPES.items()
}
"""The recipes of `ServeConfig`, on this machine's loopback interface."""


@contextmanager
def running(config: ServerConfig) -> Iterator[str]:
    """A server for the block, and where it is; then it refuses new requests, ends those that it has, and is taken down.

    SIGTERM is Ctrl-C in it, since that is what job managers and containers send. Raises `ConfigError`, `BundleError` or
    `OSError` at once for what could not be served, and `RunFailed` where its processes do not start.
    """
    application(config)  # a bundle that is none is refused before Ray is started, and claims are looked at after it
    joins = session.joins_cluster()
    with session.session(), _interrupted_by_sigterm():
        app = application(config)
        try:
            _start(app, config.http)
            yield f"http://{config.http.host}:{config.http.port}"
            _drain(config)
        finally:
            serve.delete(APPLICATION)
            if not joins:
                serve.shutdown()


def _start(app: Application, http: HttpConfig) -> None:
    try:
        serve.start(http_options=http.to_dict())
        serve.run(app, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:  # of processes too: a port that is taken, weights that do not fit
        raise RunFailed(describe(error)) from None


def _drain(config: ServerConfig) -> None:
    """While all groups are there still, which pictures under way have yet to go through."""
    patience_s = config.limits.timeout_s + DRAIN_S
    handle = serve.get_deployment_handle(INGRESS, APPLICATION)
    handle.broadcast("drain", patience_s).results(timeout_s=patience_s + DRAIN_S)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
