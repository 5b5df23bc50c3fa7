"""API keys: a file of their hashes, read again while the server runs, and each key's own limits.

A key is 256 random bits, so its plain SHA-256 may be stored: there is no list of likely keys that a salt or a slow hash
would have to protect against, as there is for passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import re
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from unclip.config.base import Config, ConfigError
from unclip.serving.errors import InvalidRequest, RateLimited, Unauthorized
from unclip.utils import storage

PREFIX = "uk-"
"""What keys begin with, so that people and scanners of leaked secrets know one."""
RELOAD_S = 5.0
"""How long a change of the file may take to count."""
RETRY_S = 2
"""When to ask again after too many pictures at once: about as long as one takes."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ApiKey:
    """Who asks, and how much.

    Args:
        id: in logs and limits.
        requests_per_minute: in the long run; as many may come at once.
        pictures_at_once: that are under way.
    """

    id: str
    requests_per_minute: float
    pictures_at_once: int


class KeyRecord(Config):
    """A key as the file holds it."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    """Whose it is; in logs."""
    sha256: str = Field(repr=False)
    """Hash of the key, 64 hexadecimal digits."""
    requests_per_minute: float = Field(60.0, gt=0)
    """In the long run; as many may come at once."""
    pictures_at_once: int = Field(10, ge=1)
    """That are under way."""
    created: str = ""
    """When it was made."""
    note: str = ""
    """For people."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (
            re.fullmatch(r"[0-9a-f]{64}", self.sha256) is None
        ):  # here, since a message of the field's own would show the value
            raise ValueError("sha256: must be 64 hexadecimal digits, and not the key itself")
        return self


class KeyFile(Config):
    """What the file holds."""

    keys: tuple[KeyRecord, ...] = ()
    """All keys that are good."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        twice = [name for name, count in Counter(record.id for record in self.keys).items() if count > 1]
        if twice:
            raise ValueError(f"keys: id {twice[0]!r} stands there twice")
        return self


def new_key() -> str:
    """A key that nobody has."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What the file holds of a key: 64 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_key_file(uri: str) -> KeyFile:
    """Raises `ConfigError` where the file cannot be read, or is not one of keys."""
    return _parse(uri, _read(uri))


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except OSError as error:
        raise ConfigError(f"keys = {uri!r}: cannot be read: {error.strerror or error}") from None


def _parse(uri: str, content: bytes) -> KeyFile:
    try:
        data = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"keys = {uri!r}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"keys = {uri!r}: must hold an object with `keys`, not {type(data).__name__}")
    try:
        return KeyFile.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"keys = {uri!r}: {error}") from None


class KeyRing:
    """The keys of a file; changes of it count within `RELOAD_S`, a broken one leaves the keys as they were.

    A thread of its own reads the file, so that a slow store holds up no request; it ends with the ring.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._content = _read(uri)
        self._keys = _by_hash(_parse(uri, self._content))

    @classmethod
    def load(cls, path: str) -> KeyRing:
        """The keys of the JSON file `path`, local or s3://; raises `ConfigError` where there is none or it is broken."""
        ring = cls(path)
        threading.Thread(target=_keep_loading, args=(weakref.ref(ring),), name="unclip-keys", daemon=True).start()
        return ring

    def of(self, authorization: str | None) -> ApiKey:
        """Whose `Authorization` header that is; raises `Unauthorized`."""
        if not authorization:
            raise Unauthorized("no API key: send it in the header `Authorization: Bearer KEY`")
        scheme, _, key = authorization.strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("the header Authorization must be `Bearer KEY`")
        digest = hash_key(key.strip())
        found = None
        for (
            known,
            api_key,
        ) in self._keys.items():  # all of them, each in constant time: nothing is learnt from how long it takes
            if hmac.compare_digest(known, digest):
                found = api_key
        if found is None:
            raise Unauthorized("the API key is not known, or not any more")
        return found

    def reload(self) -> None:
        """Reads the file again, now."""
        try:
            content = _read(self._uri)
            if content == self._content:
                return
            keys = _by_hash(_parse(self._uri, content))
        except ConfigError as error:
            _log.error("the API keys stay as they were: %s", error)
            return
        self._content, self._keys = content, keys
        _log.info("%d API keys from %r", len(keys), self._uri)


def _by_hash(file: KeyFile) -> dict[str, ApiKey]:
    return {
        record.sha256: ApiKey(record.id, record.requests_per_minute, record.pictures_at_once) for record in file.keys
    }


def _keep_loading(reference: weakref.ref[KeyRing]) -> None:
    while True:
        time.sleep(RELOAD_S)
        ring = reference()
        if ring is None:
            return
        ring.reload()
        del ring


class KeyLimits:
    """How much each key has asked for, in this process; may be used from any thread.

    Args:
        share: processes among which each key's limits are divided; no part is less than one request or picture.
        clock: seconds that never go back.
    """

    def __init__(self, share: int = 1, *, clock: Callable[[], float] = time.monotonic) -> None:
        if share < 1:
            raise ValueError(f"share = {share}: at least 1")
        self._share, self._clock = share, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}
        self._pictures: Counter[str] = Counter()

    def count_request(self, key: ApiKey) -> None:
        """Counts one; raises `RateLimited` where the key has asked too often, which does not count."""
        rate = key.requests_per_minute / self._share / 60
        with self._lock:
            bucket = self._buckets.get(key.id)
            if bucket is None or bucket.rate != rate:  # the file may have changed it
                bucket = self._buckets[key.id] = _Bucket(rate, self._clock())
            wait = bucket.take(self._clock())
        if wait > 0:
            message = f"more than {key.requests_per_minute:g} requests a minute: the limit of this API key"
            raise RateLimited(message, code="rate_limit_exceeded", retry_after=max(1, math.ceil(wait)))

    @contextmanager
    def hold(self, key: ApiKey, pictures: int) -> Iterator[None]:
        """Counts pictures while they are under way.

        Raises `RateLimited` where there are too many at once, and `InvalidRequest` where they alone are. A request for more than
        this process's part is let in when nothing else of the key is under way here.
        """
        if pictures > key.pictures_at_once:
            message = f"n = {pictures}: this API key may ask for {key.pictures_at_once} pictures at once"
            raise InvalidRequest(message, code="too_many_pictures", param="n")
        part = max(1, key.pictures_at_once // self._share)
        with self._lock:
            held = self._pictures[key.id]
            if held and held + pictures > part:
                message = f"{held} pictures are under way: this API key may ask for {key.pictures_at_once} at once"
                raise RateLimited(message, code="rate_limit_exceeded", retry_after=RETRY_S)
            self._pictures[key.id] = held + pictures
        try:
            yield
        finally:
            with self._lock:
                self._pictures[key.id] -= pictures


class _Bucket:
    """Tokens that come at `rate` a second, up to a minute's worth, at least one."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self._room = max(1.0, 60 * rate)
        self._tokens, self._at = self._room, now

    def take(self, now: float) -> float:
        """0 and a token less, or the seconds until there is one."""
        self._tokens = min(self._room, self._tokens + (now - self._at) * self.rate)
        self._at = now
        if self._tokens < 1 - 1e-9:  # who waits as long as told is let in, however the floats round
            return (1 - self._tokens) / self.rate
        self._tokens -= 1
        return 0.0
