"""Files of several blocks: any piece comes back, is checked, and costs no more than the blocks that it lies in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unclip.training import shards
from unclip.training.shards import BlockCache, DamagedError, ShardFile, write_shard
from unclip.utils import storage

BLOCK = 1000
TENSORS = {
    "large": torch.randn(70, 31),
    "small": torch.arange(5, dtype=torch.int64),
    "half": torch.randn(3, 3).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    monkeypatch.setattr(shards, "BLOCK_BYTES", BLOCK)
    path = tmp_path / "shard.safetensors"
    return path, write_shard(str(path), TENSORS)


def opened(path: Path, entry: dict[str, Any]) -> ShardFile:
    return ShardFile(str(path), size=entry["bytes"], cache=BlockCache(), hashes=entry["sha256"], block_bytes=BLOCK)


def test_it_is_safetensors_with_a_hash_a_block(written: tuple[Path, dict[str, Any]]) -> None:
    path, entry = written
    content = path.read_bytes()
    assert entry["bytes"] == len(content) > 9 * BLOCK
    pieces = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
    assert entry["sha256"] == [hashlib.sha256(piece).hexdigest() for piece in pieces]
    for name, tensor in load_file(path).items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_any_piece_comes_back(written: tuple[Path, dict[str, Any]]) -> None:
    file, flat = opened(*written), TENSORS["large"].flatten()
    for name, tensor in TENSORS.items():
        assert torch.equal(file.read_whole(name), tensor)
    for start, numel in ((0, 2170), (1, 1), (249, 3), (500, 1500), (2169, 1), (2170, 0)):
        output = torch.empty(numel)
        file.read("large", start, output)
        assert torch.equal(output, flat[start : start + numel])
    for start, numel in ((2169, 2), (-1, 3), (3000, 1)):
        with pytest.raises(DamagedError, match="'large' has no elements"):
            file.read("large", start, torch.empty(numel))
    with pytest.raises(DamagedError, match="does not hold 'huge'"):
        file.read_whole("huge")
    with pytest.raises(DamagedError, match=r"'large' is of torch\.float32, not of torch\.float64"):
        file.read("large", 0, torch.empty(1, dtype=torch.float64))


def test_damage_is_noticed_where_it_is_read(written: tuple[Path, dict[str, Any]]) -> None:
    path, entry = written
    content = bytearray(path.read_bytes())
    content[5 * BLOCK + 7] ^= 1
    path.write_bytes(bytes(content))
    file = opened(path, entry)
    assert torch.equal(file.read_whole("small"), TENSORS["small"])
    with pytest.raises(DamagedError, match=r"shard.safetensors is damaged: the hash of its bytes 5000 … 6000"):
        file.read_whole("large")
    path.write_bytes(bytes(content[:-600]))
    with pytest.raises(OSError, match=r"shard\.safetensors"):
        opened(path, entry).read_whole("flags")


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b"[]",
        json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}}).encode(),
        json.dumps({"a": {"dtype": "PICKLE", "shape": [], "data_offsets": [0, 1]}}).encode(),
    ],
)
def test_headers_are_not_trusted(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(DamagedError, match=r"bad\.safetensors is no safetensors file"):
        ShardFile(str(path), size=path.stat().st_size, cache=BlockCache(), hashes=None)
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(DamagedError, match=r"its header would have 1099511627776 bytes"):
        ShardFile(str(path), size=10, cache=BlockCache(), hashes=None)


def test_ranges_and_sizes_of_files(tmp_path: Path) -> None:
    for root in (str(tmp_path / "root"), f"memory://{tmp_path.name}"):
        storage.write_bytes(storage.join(root, "file"), b"0123456789")
        storage.write_bytes(storage.join(root, "folder", "inner"), b"1")
        assert storage.read_ranges(storage.join(root, "file"), [(0, 2), (5, 10), (3, 3)]) == [b"01", b"56789", b""]
        with pytest.raises(OSError, match="ends before its byte 11"):
            storage.read_ranges(storage.join(root, "file"), [(0, 1), (8, 11)])
        assert storage.sizes(root) == {"file": 10}
        assert storage.sizes(storage.join(root, "nowhere")) == {}
