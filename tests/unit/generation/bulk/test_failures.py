"""Rows that fail, and machines that do; several units at once."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from unclip.data.decode import decode_image
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.job import BulkJob
from unclip.generation.bulk.maker import UnitFailed
from unclip.models.clip import Tokenizer

Run = Callable[[GenerateConfig], dict[str, Any]]
MakeConfig = Callable[..., GenerateConfig]

ONE_STEP = {"up_to": 16, "decoder": {"num_inference_steps": 1}, "prior": {"num_inference_steps": 1}}


def pictures(config: GenerateConfig) -> dict[int, np.ndarray]:
    """Of all shards, by their ids."""
    tables = [pq.read_table(path) for path in sorted(Path(config.out).glob("*.parquet"))]
    return {row["id"]: decode_image(row["image"]) for table in tables for row in table.to_pylist()}


@contextmanager
def faulty_captions(*words: str) -> Iterator[None]:
    """Any network breaks that looks up the tokens of one of these words (of any word, if there are none)."""
    tokens = [int(Tokenizer(None)([word], 4)[0, 1]) for word in words]

    def check(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding) and (not tokens or torch.isin(inputs[0], torch.tensor(tokens)).any()):
            raise RuntimeError("a broken network")

    handle = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def test_rows_that_fail_do_not_take_others_with_them(config: MakeConfig, maker: Any, tmp_path: Path) -> None:
    """Requests that join a stage together with a faulty one fail with it; alone they do not."""
    words = ["heart", "explosion", "circle", "star", "bomb", "dog"]
    (tmp_path / "p.txt").write_text("".join(f"a {word}\n" for word in words))
    settings = config(prompts=str(tmp_path / "p.txt"), format="parquet", n=2, options=ONE_STEP)
    job = BulkJob.prepare(settings)
    (unit,) = job.begin()
    process = maker(job).process
    drawn: list[None] = []
    with faulty_captions("explosion", "bomb"):
        receipt = process(unit, lambda: drawn.append(None))
    assert (receipt.done, receipt.quarantined, receipt.pictures, len(drawn)) == (4, {"failed": 2}, 8, 8)
    quarantine = pq.read_table(Path(settings.out, "quarantine", "part-00000.parquet")).to_pylist()
    assert [(row["row"], row["prompt"], row["reason"]) for row in quarantine] == [
        (1, "a explosion", "failed"),
        (4, "a bomb", "failed"),
    ]
    assert "a broken network" in quarantine[0]["detail"]
    assert sorted(pictures(settings)) == [row * 10_000 + n for row in (0, 2, 3, 5) for n in (0, 1)]


def test_a_unit_of_one_bad_prompt_is_done(config: MakeConfig, maker: Any, tmp_path: Path) -> None:
    """The machine draws others."""
    (tmp_path / "p.txt").write_text("a bomb\n")
    job = BulkJob.prepare(config(prompts=str(tmp_path / "p.txt"), format="parquet", options=ONE_STEP))
    (unit,) = job.begin()
    process = maker(job).process
    with faulty_captions("bomb"):
        assert process(unit).quarantined == {"failed": 1}
    assert job.finish()["counts"]["quarantined"] == 1


def test_a_machine_that_breaks_quarantines_nothing(config: MakeConfig, maker: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a heart\na dog\na star\n")
    settings = config(
        prompts=str(tmp_path / "p.txt"), format="parquet", options=ONE_STEP, engine={"rows": {"prior": 1}}
    )
    job = BulkJob.prepare(settings)
    (unit,) = job.begin()
    process = maker(job).process
    with ExitStack() as broken, pytest.raises(UnitFailed):
        process(unit, lambda: broken.enter_context(faulty_captions()))
    assert [left.index for left in job.begin()] == [0]
    assert process(unit).done == 3


def test_a_unit_of_which_all_fail_is_not_the_prompts_fault(config: MakeConfig, maker: Any, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,n\na heart,1\n,\na star,1\na dog,1\n")
    settings = config(prompts=str(tmp_path / "p.csv"), format="parquet", options=ONE_STEP)
    job = BulkJob.prepare(settings)
    (unit,) = job.begin()
    process = maker(job).process
    with (
        faulty_captions(),
        pytest.raises(UnitFailed, match=r"unit 0: nothing can be made any more: .*a broken network"),
    ):
        process(unit)
    assert not list(Path(settings.out).glob("*.parquet"))
    assert process(unit).done == 3


def test_counts_add_up_whatever_the_rows_hold(config: MakeConfig, run: Run, tmp_path: Path) -> None:
    """Against what each row was made to be."""
    chance = random.Random(0)
    kinds: dict[str, Callable[[], str]] = {
        "done": lambda: json.dumps({"prompt": "a dog", "n": chance.randint(1, 3), "seed": chance.randrange(99)}),
        "empty": lambda: json.dumps({"prompt": chance.choice(["", None, "  "])}),
        "too_long": lambda: json.dumps({"prompt": chance.choice(["dog " * 40, "x" * 5000])}),
        "bad_prompt": lambda: json.dumps({"prompt": chance.choice([1, ["a"], "a\x00", "\udc80"])}),
        "bad_parameters": lambda: json.dumps(
            {"prompt": "a", chance.choice(["n", "seed", "size"]): chance.choice(["3", -1, True])}
        ),
        "bad_record": lambda: chance.choice(["{", "[1]", '{"prompt": "a"', "\xff"]),
    }
    chosen = [chance.choice(list(kinds)) for _ in range(150)]
    lines = [kinds[kind]() for kind in chosen]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n", encoding="latin-1")
    settings = config(prompts=str(tmp_path / "p.jsonl"), format="parquet", prompts_per_shard=37, options=ONE_STEP)
    counts = run(settings)["counts"]
    expected = Counter(chosen)
    wanted = sum(json.loads(line)["n"] for kind, line in zip(chosen, lines, strict=True) if kind == "done")
    assert (counts["prompts"], counts["done"], counts["pictures"]) == (150, expected.pop("done"), wanted)
    assert counts["reasons"] == dict(sorted(expected.items()))
    assert counts["quarantined"] == expected.total()
    parts = [pq.read_table(path) for path in sorted(Path(settings.out, "quarantine").iterdir())]
    refused = {row["row"]: row["reason"] for part in parts for row in part.to_pylist()}
    assert refused == {row: kind for row, kind in enumerate(chosen) if kind != "done"}


def test_units_at_once_are_those_one_after_the_other(config: MakeConfig, maker: Any, tmp_path: Path) -> None:
    """Also while rows of several of them fail, and wait for each other to be tried alone."""
    words = ["heart", "explosion", "circle", "star", "dog", "explosion", "cat", "tree", "sun"] * 2
    (tmp_path / "p.txt").write_text("".join(f"a {word} {number}\n" for number, word in enumerate(words)))
    made: list[dict[int, np.ndarray]] = []
    for name, at_once in (("one", 1), ("three", 3)):
        settings = config(
            prompts=str(tmp_path / "p.txt"), out=str(tmp_path / name), format="parquet", prompts_per_shard=3,
            n=1, best_of=3, options=ONE_STEP,
        )  # fmt: skip
        job = BulkJob.prepare(settings)
        units, process = job.begin(), maker(job).process
        with faulty_captions("explosion"), ThreadPoolExecutor(at_once) as threads:
            receipts = list(threads.map(process, units))
        assert [receipt.unit for receipt in receipts] == list(range(6))
        assert job.finish()["counts"]["reasons"] == {"failed": 4}
        made.append(pictures(settings))
    assert len(made[0]) == 14
    assert made[0].keys() == made[1].keys()
    for id_, picture in made[0].items():
        assert np.abs(picture.astype(int) - made[1][id_].astype(int)).max() <= 1
