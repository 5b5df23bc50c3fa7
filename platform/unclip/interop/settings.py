"""A configuration of another library, read to the last field: what is not understood is refused, never passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from unclip.config.base import Config, ConfigError
from unclip.interop.keys import InteropError

C = TypeVar("C", bound=Config)


def checked(part: str, kind: type[C], settings: Mapping[str, Any]) -> C:
    """Our configuration of a part of a source; what that refuses is refused as a whole."""
    try:
        return kind.from_dict(settings)
    except ConfigError as error:
        raise InteropError(f"{part}: {error}") from None


class Settings:
    """The fields of one configuration; each is taken, or must have the one value that ours stands for.

    Args:
        part: what it configures, for messages.
        values: its fields. Those that begin with `_` are notes of the library that wrote it.
        defaults: of the library, for fields that an older version did not write.
    """

    def __init__(self, part: str, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.part = part
        self._left = {**(defaults or {}), **{name: value for name, value in values.items() if not name.startswith("_")}}

    def take(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """The value of a field, of the type `kind`."""
        if name not in self._left:
            raise InteropError(f"{self.part}: {name} is missing")
        value = self._left.pop(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            expected = kind.__name__ if isinstance(kind, type) else " or ".join(one.__name__ for one in kind)
            raise InteropError(f"{self.part}: {name} = {value!r}: must be {expected}")
        return value

    def must(self, **expected: Any) -> None:
        """Refuses fields that have another value than the one given here; one that is not there has it."""
        for name, value in expected.items():
            found = self._left.pop(name, value)
            if found != value:
                raise InteropError(
                    f"{self.part}: {name} = {found!r}: ours has nothing for that; only {value!r} is taken over"
                )

    def done(self) -> None:
        """Refuses fields that nobody asked for."""
        if self._left:
            shown = ", ".join(f"{name} = {value!r}" for name, value in sorted(self._left.items()))
            raise InteropError(f"{self.part}: unknown {shown}")
