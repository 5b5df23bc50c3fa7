"""Downloads from servers that nobody vouches for: bounded in number, time and size, and polite."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Self

import aiohttp
from aiohttp.typedefs import LooseHeaders
from pydantic import Field
from yarl import URL

from unclip.config.base import Config

_CHUNK = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchPolicy(Config):
    """How much a part of a list, which one process reads, asks of the network and of each host."""

    concurrency: int = Field(32, gt=0)
    """Downloads at once."""
    per_host: int = Field(4, gt=0)
    """Downloads at once from one host."""
    host_interval_s: float = Field(0.0, ge=0)
    """Seconds from the start of a request to that of the next to the same host, at least."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds that one attempt may take, from looking up the host to the last byte."""
    retries: int = Field(3, ge=0)
    """Further attempts after connection errors, time-outs, cut bodies and the statuses 408, 425, 429 and 5xx."""
    backoff_s: float = Field(1.0, ge=0)
    """Seconds before the first further attempt; each wait after it is twice as long. A server's Retry-After counts
    where it is longer."""
    max_wait_s: float = Field(60.0, ge=0)
    """No wait is longer, whatever a server says."""
    max_bytes: int = Field(1 << 25, gt=0)
    """Larger answers are dropped at this size."""
    max_redirects: int = Field(5, ge=0)
    """Redirects that one download follows."""
    allow_private_addresses: bool = False
    """Whether hosts may have loopback, private, link-local and other addresses that are not public: a list could
    otherwise read the services of the network it is read in."""
    user_agent: str = "unclip (dataset download)"
    """What servers are told."""


class FetchFailed(Exception):
    """A download did not succeed; the message is why, with the last status where there was one."""


class _TryAgain(Exception):
    """An attempt failed in a way that may pass.

    Args:
        wait_s: what the server asks to wait.
    """

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _PrivateAddress(OSError):
    """The host is none of the public internet."""


class _Host:
    """What is under way with one host."""

    def __init__(self, downloads: int) -> None:
        self.slots = asyncio.Semaphore(downloads)
        self.turn = asyncio.Lock()
        self.next_start = 0.0


@dataclass(frozen=True)
class _Redirect:
    location: str


class Downloader:
    """Context manager with a thread of its own for the network: a user of its results may pause without time-outs.

    `submit(url)` gives a future of the bytes; it raises `FetchFailed`.
    """

    def __init__(self, policy: FetchPolicy) -> None:
        self.policy = policy
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="downloads", daemon=True)
        self._hosts: dict[str, _Host] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, url: str) -> Future[bytes]:
        return asyncio.run_coroutine_threadsafe(self._download(url), self._loop)

    async def _open(self) -> None:
        self._slots = asyncio.Semaphore(self.policy.concurrency)
        headers: LooseHeaders = {"User-Agent": self.policy.user_agent, "Accept-Encoding": "identity"}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=self._socket),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None),  # `_attempt` has one limit for the whole
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def _close(self) -> None:
        downloads = asyncio.all_tasks() - {asyncio.current_task()}
        for download in downloads:
            download.cancel()
        await asyncio.gather(*downloads, return_exceptions=True)
        await self._session.close()

    def _socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        """The one place where connections begin: whatever a name, redirect or odd spelling led to is known here."""
        family, kind, protocol, _, place = address
        if not self.policy.allow_private_addresses and not is_public(str(place[0])):
            raise _PrivateAddress("the host has no public address")
        return socket.socket(family, kind, protocol)

    async def _download(self, url: str) -> bytes:
        for _ in range(self.policy.max_redirects + 1):
            target = _checked(url)
            host = self._hosts.setdefault(target.host or "", _Host(self.policy.per_host))
            async with host.slots:
                answer = await self._attempts(target, host)
            if isinstance(answer, bytes):
                return answer
            url = str(target.join(_parsed(answer.location)))
        raise FetchFailed(f"more than {self.policy.max_redirects} redirects")

    async def _attempts(self, url: URL, host: _Host) -> bytes | _Redirect:
        attempt = 0
        while True:
            try:
                async with self._turn(host):
                    return await self._attempt(url)
            except _TryAgain as error:
                if attempt == self.policy.retries:
                    raise FetchFailed(f"{error}; {attempt + 1} attempts") from error
                wait = max(error.wait_s, self.policy.backoff_s * 2**attempt)
            await asyncio.sleep(min(wait, self.policy.max_wait_s))
            attempt += 1

    @contextlib.asynccontextmanager
    async def _turn(self, host: _Host) -> AsyncIterator[None]:
        """One of the downloads at once, no sooner than the host's interval allows; nothing is held while that passes."""
        async with host.turn:
            await asyncio.sleep(host.next_start - time.monotonic())
            await self._slots.acquire()
            host.next_start = time.monotonic() + self.policy.host_interval_s
        try:
            yield
        finally:
            self._slots.release()

    async def _attempt(self, url: URL) -> bytes | _Redirect:
        try:
            async with asyncio.timeout(self.policy.timeout_s):
                async with self._session.get(url, allow_redirects=False) as response:
                    return await self._answer(response)
        except TimeoutError:
            raise _TryAgain(f"no whole answer in {self.policy.timeout_s:g} s") from None
        except (
            aiohttp.ClientConnectorError,
            aiohttp.ClientPayloadError,
            aiohttp.ServerDisconnectedError,
            aiohttp.ClientOSError,
        ) as error:
            if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, _PrivateAddress):
                raise FetchFailed(str(error.os_error)) from None
            raise _TryAgain(f"{type(error).__name__}: {error}") from None
        except (aiohttp.ClientError, ValueError) as error:
            raise FetchFailed(f"{type(error).__name__}: {error}") from None

    async def _answer(self, response: aiohttp.ClientResponse) -> bytes | _Redirect:
        if response.status in _REDIRECTS and "Location" in response.headers:
            return _Redirect(response.headers["Location"])
        if response.status in _LATER:
            raise _TryAgain(f"HTTP {response.status}", _retry_after(response.headers.get("Retry-After")))
        if response.status != 200:
            raise FetchFailed(f"HTTP {response.status}")
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            body += chunk
            if len(body) > self.policy.max_bytes:
                raise FetchFailed(f"HTTP 200, but more than {self.policy.max_bytes} bytes")
        return bytes(body)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also that which it may stand for inside IPv6."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _parsed(url: str) -> URL:
    try:
        return URL(url)
    except ValueError as error:
        raise FetchFailed(f"no address: {error}") from None


def _checked(url: str) -> URL:
    parsed = _parsed(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise FetchFailed("no http or https address")
    return parsed


def _retry_after(value: str | None) -> float:
    """Seconds that the header asks for: a number of them, or a date."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    except ValueError:
        return 0.0
