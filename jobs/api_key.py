"""Makes, lists and revokes the API keys of a server: `python jobs/api_key.py create --file keys.json --id NAME`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.config.cli import parse_flags
from unclip.serving.guards.keys import KeyFile, KeyRecord, hash_key, new_key, read_key_file
from unclip.utils import storage


class ApiKeyConfig(Config):
    """What shall be done with which file."""

    action: Literal["create", "list", "revoke"]
    """create prints a new key, which is stored nowhere; list shows all but the keys; revoke ends one."""
    file: str = Field(min_length=1)
    """JSON file of the keys' hashes, local or s3://; create makes it where there is none. One job at a time may change it."""
    id: str = ""
    """Whose key it is; in logs and limits."""
    requests_per_minute: float = Field(60.0, gt=0)
    """In the long run; as many may come at once."""
    pictures_at_once: int = Field(10, ge=1)
    """That are under way."""
    note: str = ""
    """For people."""


def create(config: ApiKeyConfig, file: KeyFile) -> None:
    """Adds a key and prints it, the only time that anybody sees it."""
    if any(record.id == config.id for record in file.keys):
        raise ConfigError(f"id = {config.id!r}: has a key already; revoke it first")
    key = new_key()
    record = KeyRecord.from_dict(
        {
            "id": config.id,
            "sha256": hash_key(key),
            "requests_per_minute": config.requests_per_minute,
            "pictures_at_once": config.pictures_at_once,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "note": config.note,
        }
    )
    write(config.file, KeyFile(keys=(*file.keys, record)))
    print(key)
    print(f"the key of {config.id!r} is not shown again; {config.file!r} holds its hash", file=sys.stderr)


def show(file: KeyFile) -> None:
    """One line a key, tabs between its fields."""
    print("id\trequests/min\tpictures at once\tcreated\tnote")
    for record in file.keys:
        limits = f"{record.requests_per_minute:g}\t{record.pictures_at_once}"
        print(f"{record.id}\t{limits}\t{record.created}\t{record.note}")


def revoke(config: ApiKeyConfig, file: KeyFile) -> None:
    """Takes a key out; running servers stop knowing it some seconds later."""
    kept = tuple(record for record in file.keys if record.id != config.id)
    if len(kept) == len(file.keys):
        raise ConfigError(f"id = {config.id!r}: has no key in {config.file!r}")
    write(config.file, KeyFile(keys=kept))


def write(uri: str, file: KeyFile) -> None:
    """Replaces the file; on local disk it is its owner's alone."""
    before = os.umask(0o077)
    try:
        storage.write_json(uri, file.to_dict())
    finally:
        os.umask(before)


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_flags(__doc__ or "", ApiKeyConfig, argv, positional="action")
    try:
        is_new = config.action == "create" and not storage.exists(config.file)
        file = KeyFile() if is_new else read_key_file(config.file)
        match config.action:
            case "create":
                create(config, file)
            case "list":
                show(file)
            case "revoke":
                revoke(config, file)
    except (ConfigError, OSError) as error:
        print(f"api_key: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
