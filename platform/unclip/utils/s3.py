"""S3 and stores that speak its protocol, as a file system that answers completely or raises an `OSError` naming the object.

One policy for every request of the platform, in place of the two that s3fs and botocore would stack: throttling, errors of
the server, broken connections and bodies that end early are tried again, `AWS_MAX_ATTEMPTS` times in all, with growing
random pauses or what `Retry-After` asks for; silence and trickling end by timeouts. Everything else fails at once.

Endpoint, region and credentials come from the environment as botocore reads it: `AWS_ENDPOINT_URL`, `AWS_REGION`,
`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, `AWS_PROFILE`, a web identity (`AWS_ROLE_ARN`,
`AWS_WEB_IDENTITY_TOKEN_FILE`), or the machine's role.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.errors import translate_boto_error

DEFAULT_ATTEMPTS = 8
"""Tries of a request, with pauses of 26 s in the mean all together, where `AWS_MAX_ATTEMPTS` says nothing."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 20.0
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
"""Silence that ends an attempt."""
ATTEMPT_LIMIT_S = 120.0
SLOWEST_BYTES_PER_S = 64 * 2**10
"""An attempt may last `ATTEMPT_LIMIT_S` and as long as its bytes take at this rate, even where none of it is silence."""
BLOCK_BYTES = 8 * 2**20
"""What an open file reads ahead."""
RANGE_BYTES = 16 * 2**20
RANGES_AT_ONCE = 8
"""Ranges of a download or parts of an upload that are under way together; they are held in memory."""
PART_BYTES = 16 * 2**20
MAX_PARTS = 10_000
"""Of a multipart upload, by the protocol."""
CONNECTIONS = 64

_BROKEN = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)
_BUSY_STATUS = {429, 500, 502, 503, 504, 509}
_BUSY_CODES = {
    "BadDigest",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
_NO_CREDENTIALS = (
    "no credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or AWS_ROLE_ARN and "
    "AWS_WEB_IDENTITY_TOKEN_FILE"
)
_log = logging.getLogger(__name__)


class UploadLostError(FileNotFoundError):
    """The store no longer knows a multipart upload, as after a completion whose answer did not arrive."""


class _Body:
    """What s3fs takes for the body of a response, already here."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self) -> bytes:
        return self._content

    def close(self) -> None:
        """Nothing is open."""


class S3(S3FileSystem):
    """s3fs with one policy of retries, complete answers, named errors, and no memory of what a folder held before."""

    retries = 1  # s3fs's own layer, which knows nothing of throttled or refused requests
    default_block_size = BLOCK_BYTES

    def __init__(self, **options: Any) -> None:
        limits = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": CONNECTIONS,
            "retries": {"total_max_attempts": 1},
        }
        # One GET reads an object that is wanted whole, so that it is one version of it.
        super().__init__(config_kwargs=limits, use_listings_cache=False, max_concurrency=1, **options)

    async def _call_s3(self, method: str, *options: dict[str, Any], **arguments: Any) -> Any:
        """The complete answer to a request; every one that s3fs makes comes through here."""
        uri = _uri(arguments)
        try:
            client = await self.set_session()
        except (boto.BotoCoreError, OSError, ValueError) as error:
            raise _named(error, uri, method, attempts=1) from error
        call = getattr(client, method)
        arguments = self._get_s3_method_kwargs(call, *options, **arguments)
        attempts = _attempts()
        for attempt in range(1, attempts + 1):
            try:
                return await _complete(call, arguments)
            except (boto.BotoCoreError, boto.ClientError, OSError, *_BROKEN) as error:
                if attempt == attempts or not _passes(error):
                    raise _named(error, uri, method, attempt) from error
                pause = _pause(error, attempt)
                _log.info("%s: %s, attempt %d of %d: %s", uri, method, attempt, attempts, error)
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    call_s3 = sync_wrapper(_call_s3)

    async def _get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        """Downloads in ranges, all of one version of the object: what breaks off costs one of them."""
        bucket, key, _ = self.split_path(rpath)
        info = await self._info(rpath)
        if info["type"] != "file":
            raise IsADirectoryError(f"s3://{bucket}/{key} is a folder")

        async def part(start: int) -> bytes:
            wanted = f"bytes={start}-{min(start + RANGE_BYTES, info['size']) - 1}"
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted, IfMatch=info["ETag"])
            return await answer["Body"].read()

        with open(lpath, "wb") as file:
            for first in range(0, info["size"], RANGE_BYTES * RANGES_AT_ONCE):
                stop = min(first + RANGE_BYTES * RANGES_AT_ONCE, info["size"])
                for content in await asyncio.gather(*map(part, range(first, stop, RANGE_BYTES))):
                    file.write(content)

    async def _put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        """Uploads in parts, and again where the upload got lost; raises `OSError` where not all of it arrived."""
        size = os.path.getsize(lpath)
        parts = {"chunksize": max(PART_BYTES, -(-size // MAX_PARTS)), "max_concurrency": RANGES_AT_ONCE}
        await _again_if_lost(lambda: super(S3, self)._put_file(lpath, rpath, **(parts | options)))
        stored = (await self._info(rpath))["size"]
        if stored != size:
            raise OSError(f"s3://{rpath} has {stored} bytes after an upload of {size}")

    async def _pipe_file(self, path: str, data: bytes, **options: Any) -> None:
        await _again_if_lost(lambda: super(S3, self)._pipe_file(path, data, **options))


def connection() -> S3:
    """The file system that this process shares between its threads, for the environment as it is now."""
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _connection(os.getpid(), environment)


@functools.lru_cache(maxsize=8)
def _connection(*key: Any) -> S3:  # noqa: ARG001 which the cache keeps it by
    return S3(skip_instance_cache=True)


async def _complete(call: Callable[..., Awaitable[Any]], arguments: dict[str, Any]) -> Any:
    """One attempt: the answer with its body read; raises where it is not all there."""
    body = arguments.get("Body", b"")
    async with asyncio.timeout(ATTEMPT_LIMIT_S + len(body) / SLOWEST_BYTES_PER_S):
        answer = await call(**arguments)
    if "Errors" in answer:  # of some of the keys that were to be deleted, inside a success
        raise boto.ClientError({"Error": answer["Errors"][0]}, "DeleteObjects")
    if "Body" not in answer:
        return answer
    async with answer["Body"] as stream:
        if "Range" in arguments and "ContentRange" not in answer:
            raise boto.HTTPClientError(error=f"asked for {arguments['Range']}, the store sent the whole object")
        async with asyncio.timeout(ATTEMPT_LIMIT_S + answer["ContentLength"] / SLOWEST_BYTES_PER_S):
            content = await stream.read()
    if len(content) != answer["ContentLength"]:
        raise boto.IncompleteReadError(actual_bytes=len(content), expected_bytes=answer["ContentLength"])
    return answer | {"Body": _Body(content)}


async def _again_if_lost(upload: Callable[[], Awaitable[Any]]) -> None:
    try:
        await upload()
    except UploadLostError:
        await upload()


def _passes(error: Exception) -> bool:
    """Whether the same request may well succeed a little later."""
    if not isinstance(error, boto.ClientError):
        return isinstance(error, _BROKEN)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in _BUSY_STATUS or error.response.get("Error", {}).get("Code") in _BUSY_CODES


def _pause(error: Exception, attempt: int) -> float:
    """Seconds before the attempt after the `attempt`-th: random, so that workers do not come back all at once."""
    pause = random.uniform(0, min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S))  # noqa: S311
    if isinstance(error, boto.ClientError):
        asked = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
        if asked.isdecimal():
            pause += min(float(asked), LONGEST_PAUSE_S)
    return pause


def _attempts() -> int:
    text = os.environ.get("AWS_MAX_ATTEMPTS", str(DEFAULT_ATTEMPTS))
    if not text.isdecimal() or int(text) < 1:
        raise OSError(f"AWS_MAX_ATTEMPTS must be a whole number of at least 1, not {text!r}")
    return int(text)


def _uri(arguments: dict[str, Any]) -> str:
    return f"s3://{arguments.get('Bucket', '')}/{arguments.get('Key') or arguments.get('Prefix') or ''}"


def _named(error: Exception, uri: str, method: str, attempts: int) -> OSError:
    """The `OSError` for what a request failed with; `TimeoutError` never, which s3fs would take up again."""
    tries = f" ({attempts} attempts)" if attempts > 1 else ""
    if isinstance(error, boto.ClientError):
        details = error.response.get("Error", {})
        message = f"{uri}: {error.operation_name}: {details.get('Code')}: {details.get('Message')}{tries}"
        if details.get("Code") == "NoSuchUpload":
            return UploadLostError(message)
        translated = translate_boto_error(error, message=message)
        return OSError(message) if isinstance(translated, TimeoutError) else translated
    if isinstance(error, boto.NoCredentialsError):
        return PermissionError(f"{uri}: {_NO_CREDENTIALS}")
    kind = ConnectionError if isinstance(error, boto.EndpointConnectionError) else OSError
    return kind(f"{uri}: {method}: {str(error) or 'too slow'}{tries}")
