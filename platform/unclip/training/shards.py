"""The files of a checkpoint: safetensors, written and hashed in one pass, read in pieces that are checked.

A file's hashes are those of its blocks of `BLOCK_BYTES`, so that a reader can check the little that it needs of a large
file: neither the whole file nor a copy of it on disk is ever needed. Of a file of one block it is the hash of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch

from unclip.utils import storage

BLOCK_BYTES = 4 * 2**20
"""What is hashed, and read, as one."""
BLOCKS_AT_ONCE = 8
"""Blocks that are asked for together, and as many are kept: a reader holds at most twice that beside what it returns."""
_MAX_HEADER_BYTES = 100_000_000
"""As in safetensors itself."""
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class DamagedError(RuntimeError):
    """A file's content is not what was written."""


def write_shard(uri: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes contiguous CPU tensors as one safetensors file; returns its `bytes` and `sha256`, a hash a block."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    with storage.local_target(uri) as path, path.open("wb") as file:
        out = _HashedFile(file)
        out.write(memoryview(_header(ordered)))
        for _, tensor in ordered:
            if tensor.numel():
                out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return {"bytes": file.tell(), "sha256": out.hashes()}


class BlockCache:
    """The blocks that were read last, of any file."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def get(self, file: ShardFile, indices: Sequence[int]) -> list[bytes]:
        """At most `BLOCKS_AT_ONCE` blocks of a file."""
        keys = [(file.uri, index) for index in indices]
        missing = [index for index in indices if (file.uri, index) not in self._blocks]
        read = dict(zip(missing, file.read_blocks(missing), strict=True)) if missing else {}
        found = [read[index] if index in read else self._blocks[key] for key, index in zip(keys, indices, strict=True)]
        for key, block in zip(keys, found, strict=True):
            self._blocks[key] = block
            self._blocks.move_to_end(key)
        while len(self._blocks) > BLOCKS_AT_ONCE:
            self._blocks.popitem(last=False)
        return found


class ShardFile:
    """Reads pieces of a safetensors file, here or on object storage, without holding more than some blocks of it.

    `hashes` are those of its blocks of `block_bytes`; None: what is read is not checked.
    Raises `DamagedError` naming the file where its content is not what was written, `OSError` where it cannot be read.
    """

    def __init__(
        self, uri: str, *, size: int, cache: BlockCache, hashes: Sequence[str] | None, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.uri = uri
        self._size, self._block_bytes = size, block_bytes
        self._hashes, self._cache = hashes, cache
        self._start, self._entries = self._read_header()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: tuple(entry["shape"]) for name, entry in self._entries.items()}

    def read(self, name: str, start: int, output: torch.Tensor) -> None:
        """Fills `output`, (numel,) of the tensor's own type, with elements `start … start + numel` of the flattened tensor."""
        entry = self._entry(name)
        kind, (first, last), stop = _TYPES[entry["dtype"]], entry["data_offsets"], start + output.numel()
        if output.dtype != kind:
            raise DamagedError(f"{self.uri}: {name!r} is of {kind}, not of {output.dtype}")
        if not 0 <= start <= stop <= (last - first) // kind.itemsize:
            raise DamagedError(f"{self.uri}: {name!r} has no elements {start} … {stop}")
        if output.numel():
            self._fill(output.view(torch.uint8).numpy().data, self._start + first + start * kind.itemsize)

    def read_whole(self, name: str) -> torch.Tensor:
        """A tensor in its own shape and type."""
        entry = self._entry(name)
        output = torch.empty(math.prod(entry["shape"]), dtype=_TYPES[entry["dtype"]])
        self.read(name, 0, output)
        return output.view(tuple(entry["shape"]))

    def read_blocks(self, indices: Sequence[int]) -> list[bytes]:
        """Whole blocks, checked; the last one of a file may be shorter."""
        edges = [(i * self._block_bytes, min((i + 1) * self._block_bytes, self._size)) for i in indices]
        blocks = storage.read_ranges(self.uri, edges)
        for index, (start, stop), block in zip(indices, edges, blocks, strict=True):
            if self._hashes is not None and hashlib.sha256(block).hexdigest() != self._hashes[index]:
                raise DamagedError(f"{self.uri} is damaged: the hash of its bytes {start} … {stop} is another")
        return blocks

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._entries:
            raise DamagedError(f"{self.uri} does not hold {name!r}")
        entry: dict[str, Any] = self._entries[name]
        return entry

    def _fill(self, output: memoryview, position: int) -> None:
        """Copies the file's bytes from `position` on into `output`, some blocks at a time."""
        stop = position + len(output)
        if stop > self._size:
            raise DamagedError(f"{self.uri} ends before its byte {stop}")
        block_bytes = self._block_bytes
        for first in range(position // block_bytes, -(-stop // block_bytes), BLOCKS_AT_ONCE):
            indices = range(first, min(first + BLOCKS_AT_ONCE, -(-stop // block_bytes)))
            for index, block in zip(indices, self._cache.get(self, indices), strict=True):
                low, high = max(position, index * block_bytes), min(stop, (index + 1) * block_bytes)
                output[low - position : high - position] = block[low - index * block_bytes : high - index * block_bytes]

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        """Where the data begins, and the entry of each tensor."""
        length = bytearray(8)
        self._fill(memoryview(length), 0)
        size = int.from_bytes(length, "little")
        if size > min(_MAX_HEADER_BYTES, self._size - 8):
            raise DamagedError(f"{self.uri} is no safetensors file: its header would have {size} bytes")
        content, data_size = bytearray(size), self._size - 8 - size
        self._fill(memoryview(content), 8)
        try:
            entries = json.loads(content)
            entries.pop("__metadata__", None)
            for entry in entries.values():
                kind, (first, last) = _TYPES[entry["dtype"]], entry["data_offsets"]
                if last - first != math.prod(entry["shape"]) * kind.itemsize or not 0 <= first <= last <= data_size:
                    raise ValueError("sizes that do not fit")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(f"{self.uri} is no safetensors file that this version reads: {error!r}") from None
        return 8 + size, entries


class _HashedFile:
    """Writes to a file and hashes what it writes, block by block."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hashes: list[str] = []
        self._digest, self._filled = hashlib.sha256(), 0

    def write(self, content: memoryview) -> None:
        while content:
            part = content[: BLOCK_BYTES - self._filled]
            self._file.write(part)
            self._digest.update(part)
            self._filled += len(part)
            content = content[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def hashes(self) -> list[str]:
        if self._filled:
            self._end_block()
        return self._hashes

    def _end_block(self) -> None:
        self._hashes.append(self._digest.hexdigest())
        self._digest, self._filled = hashlib.sha256(), 0


def _header(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    names = {kind: name for name, kind in _TYPES.items()}
    entries, offset = {}, 0
    for name, tensor in tensors:
        stop = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content
