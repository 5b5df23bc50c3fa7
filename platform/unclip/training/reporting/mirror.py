"""A local folder for libraries that write nowhere else, kept in the run folder wherever that is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from unclip.utils import storage


class MirroredFolder:
    """`path` is local; `push` copies to `uri` what has changed. Where `uri` is local, it is that folder itself."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._temporary = None if storage.is_local(uri) else tempfile.TemporaryDirectory(prefix="unclip-view-")
        self.path = Path(self._temporary.name if self._temporary else storage.absolute(uri))
        self.path.mkdir(parents=True, exist_ok=True)
        self._copied: dict[Path, tuple[int, int]] = {}

    def push(self) -> None:
        """Copies the files that were written to since the last call."""
        if self._temporary is None:
            return
        for file in sorted(path for path in self.path.rglob("*") if path.is_file() and not path.is_symlink()):
            state = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._copied.get(file) != state:
                storage.write_bytes(storage.join(self._uri, file.relative_to(self.path).as_posix()), file.read_bytes())
                self._copied[file] = state

    def close(self) -> None:
        """Copies the last changes; a temporary folder goes."""
        self.push()
        if self._temporary is not None:
            self._temporary.cleanup()
