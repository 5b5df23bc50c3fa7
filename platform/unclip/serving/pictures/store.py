"""Pictures that are handed out by address: on local disk or object storage, for a while, to whoever knows the name."""

from __future__ import annotations

import base64
import logging
import math
import re
import secrets
import threading
import time
from typing import get_args

from unclip.serving.errors import NotFound
from unclip.serving.pictures.encoding import MEDIA_TYPES, Form
from unclip.utils import storage

MAX_BYTES = 10 * 2**30
"""Of all pictures in a folder: seven thousand PNG files of 1024 pixels, two a second for an hour. The oldest go first."""
SWEEP_S = 60.0
"""Least time between two sweeps."""
MAX_REMOVED = 500
"""Files that a sweep removes at most: on object stores each takes some requests. The next picture begins another one."""
_NAME = re.compile(rf"([0-9a-f]{{10}})-[a-z2-7]{{26}}\.({'|'.join(get_args(Form))})")
_log = logging.getLogger(__name__)


class PictureStore:
    """A folder of pictures, which any number of processes may share; all methods may be called from any thread.

    A name holds the second at which the picture goes and 128 random bits, so nobody guesses it, and nothing but the names is
    needed to sweep.

    Args:
        folder: local or s3://.
        lifetime_s: how long a picture is handed out.
    """

    def __init__(self, folder: str, lifetime_s: int) -> None:
        self._folder, self._lifetime_s = folder, lifetime_s
        self._swept_at = -math.inf
        self._sweeping = threading.Lock()

    def put(self, content: bytes, form: Form) -> str:
        """Keeps an encoded picture and returns its name; raises `OSError` where it cannot be written."""
        random = base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()
        name = f"{int(time.time()) + self._lifetime_s:010x}-{random}.{form}"
        storage.write_bytes(storage.join(self._folder, name), content)
        if time.monotonic() - self._swept_at > SWEEP_S:
            threading.Thread(target=self.sweep, name="unclip-pictures", daemon=True).start()
        return name

    def get(self, name: str) -> tuple[bytes, str]:
        """Content and media type of a picture; raises `NotFound` where there is none, or none any more."""
        found = _NAME.fullmatch(name)
        if found is None or int(found[1], 16) <= time.time():
            raise _no_picture(name)
        try:
            content = storage.read_bytes(storage.join(self._folder, name))
        except FileNotFoundError:
            raise _no_picture(name) from None
        return content, MEDIA_TYPES[found[2]]  # type: ignore[index]  # the pattern knows only these

    def sweep(self) -> None:
        """Removes pictures that nobody is handed any more, then the oldest of too many bytes; one thread at a time."""
        if not self._sweeping.acquire(blocking=False):
            return
        try:
            self._swept_at = time.monotonic()
            superfluous = self._superfluous()
            for name in superfluous[:MAX_REMOVED]:
                storage.remove(storage.join(self._folder, name))
            if len(superfluous) > MAX_REMOVED:
                self._swept_at = -math.inf
        except OSError as error:
            _log.warning("pictures in %r cannot be swept: %s", self._folder, error)
        finally:
            self._sweeping.release()

    def _superfluous(self) -> list[str]:
        """Names of files to remove, the oldest first; what else lies in the folder is left alone."""
        sizes = {name: size for name, size in storage.sizes(self._folder).items() if _NAME.fullmatch(name)}
        total, now, found = sum(sizes.values()), time.time(), []
        for name in sorted(sizes):
            if int(name[:10], 16) > now and total <= MAX_BYTES:
                break
            found.append(name)
            total -= sizes[name]
        return found


def _no_picture(name: str) -> NotFound:
    return NotFound(
        f"no picture {name[:64]!r}; pictures are kept for a while only", code="picture_not_found", param="name"
    )
