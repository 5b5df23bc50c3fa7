"""Files of the Hugging Face hub by one name: `hf-hub:ORG/NAME/FILE`, or `hf-hub:ORG/NAME@REVISION/FILE`.

A file is fetched once and kept where all of the hub's tools keep theirs (`HF_HOME`); `HF_HUB_OFFLINE=1` takes only what is
there. Without a revision it is the repository's main branch, which may change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HUB_PREFIX = "hf-hub:"
_NAME = re.compile(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?")


class HubName(NamedTuple):
    """What a name says.

    Args:
        repo: `ORG/NAME`.
        revision: branch, tag or commit; None for the main branch.
        path: of a file in the repository; None for all of it.
    """

    repo: str
    revision: str | None
    path: str | None


def parse_hub(source: str) -> HubName | None:
    """None where `source` is no name of the hub; `ValueError` where it begins like one and is none."""
    if not source.startswith(HUB_PREFIX):
        return None
    match = _NAME.fullmatch(source)
    if match is None:
        raise ValueError(f"{source!r}: expected {HUB_PREFIX}ORG/NAME, perhaps @REVISION and /FILE behind it")
    return HubName(*match.groups())


def hub_file(name: HubName) -> Path:
    """Where a file of the hub lies on this machine, fetched if it is not there.

    Raises `OSError` where there is no such file, it may not be read, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download  # here: it takes a second to import
    from huggingface_hub.errors import HFValidationError

    assert name.path is not None
    try:
        return Path(hf_hub_download(name.repo, name.path, revision=name.revision))
    except HFValidationError as error:  # its other errors are OSErrors
        raise OSError(str(error)) from None


def hub_folder(name: HubName, files: Sequence[str], *, at_most: int) -> Path:
    """A folder with those of `files` that the repository has, fetched if they are not there; it is named after the commit.

    Args:
        name: of a repository.
        files: paths in it; nothing else is fetched.
        at_most: bytes that each may have.

    Raises `OSError` where none of them is there, one is larger, or the hub cannot be reached and they were never fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    wanted = list(files)
    try:
        try:
            found = snapshot_download(
                name.repo, revision=name.revision, allow_patterns=wanted, dry_run=True, tqdm_class=NoBar
            )
        except DryRunError:  # the hub cannot be reached: what was fetched before is all there is
            return Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=wanted))
        if not found:
            raise FileNotFoundError(f"{name.repo} has no {wanted[0]} nor any other of the files that are wanted")
        for file in found:
            if file.file_size is None or file.file_size > at_most:
                raise OSError(f"{file.filename} has {file.file_size} bytes, but at most {at_most} can be right")
        # Of the commit that was looked at, should the branch have moved on.
        return Path(snapshot_download(name.repo, revision=found[0].commit_hash, allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name.repo} is no repository of the hub that may be read; HF_TOKEN opens one's own"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(f"{name.repo} has no revision {name.revision!r}") from None
    except HFValidationError as error:
        raise OSError(str(error)) from None
