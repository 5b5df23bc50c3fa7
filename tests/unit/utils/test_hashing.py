from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from unclip.utils.hashing import fingerprint, sha256_file


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_fingerprint_ignores_order_and_layout() -> None:
    a, b = torch.randn(4, 3, 2, 2), torch.arange(6)
    one = fingerprint({"a": a, "b": b})
    assert fingerprint({"b": b.clone(), "a": a.clone(memory_format=torch.channels_last).requires_grad_()}) == one
    assert len(one) == 64


def test_fingerprint_sees_names_types_shapes_values_and_description() -> None:
    base = torch.zeros(2, 2)
    changed = base.clone()
    changed[1, 1] = 1e-30
    variants = [
        ({"a": base}, ""),
        ({"b": base}, ""),
        ({"a": base.int()}, ""),
        ({"a": base.view(4)}, ""),
        ({"a": changed}, ""),
        ({"a": base}, "described"),
        ({"a": base, "b": base}, ""),
        ({"a": torch.tensor(0.0)}, ""),
        ({"a": base.bfloat16()}, ""),
        ({}, ""),
    ]
    assert len({fingerprint(tensors, description) for tensors, description in variants}) == len(variants)
