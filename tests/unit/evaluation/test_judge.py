"""The judge of attributes: what its networks see, how well they judge what they have not seen, and what is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jobs import train_judge as job
from tests.support.judge import COLOURS, caption_of, judge_config, write_squares

from unclip.config.base import ConfigError
from unclip.data.manifest import DataError
from unclip.evaluation.judge.accuracy import all_right, best_constant
from unclip.evaluation.judge.examples import UNKNOWN, Examples, read_examples
from unclip.evaluation.judge.folder import Judge
from unclip.evaluation.judge.job import train_judge
from unclip.evaluation.judge.learning import augment, train_network
from unclip.evaluation.judge.network import JudgeNetwork, as_ink
from unclip.utils.progress import progress_bar


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def trained(examples: Examples, fold: int) -> dict[str, torch.Tensor]:
    with progress_bar(3, "step") as bar:
        return train_network(examples, fold, judge_config("", Path(), steps=3), bar).state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_it_knows_the_attributes_of_pictures_that_it_has_not_seen(squares_judge: str) -> None:
    facts = json.loads(Path(squares_judge, "judge.json").read_text())
    assert facts["classes"] == {"colour": sorted(COLOURS), "count": ["1", "2"]}
    constant = {"colour": 1 / 3, "count": 1 / 2, "all": 1 / 6}
    assert facts["accuracy"].keys() == constant.keys()
    for name, shares in facts["accuracy"].items():
        assert shares["pictures"] == 240
        assert shares["right"] > 0.97
        assert shares["constant"] == pytest.approx(constant[name])


def test_a_network_has_seen_nothing_of_its_fold(squares: str) -> None:
    examples = read_examples(judge_config(squares, Path()))
    pictures, labels = examples.pictures.copy(), examples.labels.copy()
    pictures[examples.folds == 0] = 0
    labels[examples.folds == 0, 0] = 0
    changed = dataclasses.replace(examples, pictures=pictures, labels=labels)
    assert same(trained(examples, 0), trained(changed, 0))
    assert not same(trained(examples, 1), trained(changed, 1))


def test_pictures_of_one_caption_or_of_the_same_pixels_are_in_one_fold(tmp_path: Path) -> None:
    """And every class is in as many folds as it can be, which for the rarest are two."""
    captions = [f"drawing {number // 2}" for number in range(48)]
    first = write_squares(tmp_path / "first", range(48), seed=1, captions=captions)
    again = write_squares(tmp_path / "again", range(48), seed=1, captions=[f"{text} again" for text in captions])
    rare = write_squares(tmp_path / "rare", [0, 1], seed=2, captions=["x", "y"])
    table = pq.read_table(Path(rare, "data-00000.parquet"))
    rarer = table.set_column(table.schema.get_field_index("colour"), "colour", pa.array(["pink", "pink"]))
    pq.write_table(rarer, Path(rare, "data-00000.parquet"))
    examples = read_examples(judge_config(first, tmp_path, records=[first, again, rare], folds=4))
    for keys in (examples.captions, [picture.tobytes() for picture in examples.pictures]):
        assert all(len({fold for _, fold in rows}) == 1 for _, rows in grouped(keys, examples.folds.tolist()))
    folds_of = {
        value: len(np.unique(examples.folds[examples.labels[:, 0] == label]))
        for label, value in enumerate(examples.classes["colour"])
    }
    assert folds_of == {"blue": 4, "green": 4, "pink": 2, "red": 4}


def grouped(keys: list[object], values: list[int]) -> list[tuple[object, list[tuple[object, int]]]]:
    pairs = sorted(zip(keys, values, strict=True), key=lambda pair: pair[0])
    return [(key, list(rows)) for key, rows in itertools.groupby(pairs, key=lambda pair: pair[0])]


def test_what_one_drawing_alone_has_is_not_judged(squares: str, tmp_path: Path) -> None:
    alone = write_squares(tmp_path / "alone", [0], seed=3, captions=["a pink one"])
    table = pq.read_table(Path(alone, "data-00000.parquet"))
    pink = table.set_column(table.schema.get_field_index("colour"), "colour", pa.array(["pink"]))
    pq.write_table(pink, Path(alone, "data-00000.parquet"))
    found = train_judge(judge_config(squares, tmp_path / "judge", records=[squares, alone], steps=1))
    assert found["not_judged"] == {"colour": ["pink"]}
    assert found["accuracy"]["colour"]["pictures"] == 240
    known = Judge.load("judge", str(tmp_path / "judge")).captions
    assert known.stated[known.rows["a pink one"]].tolist() == [UNKNOWN, 0]


def test_pictures_of_one_caption_that_differ_leave_it_open(tmp_path: Path) -> None:
    """Numbers 0 and 1 are of one colour and of two counts; 2 states another colour; 3 is without a caption."""
    texts = ["a drawing", "a drawing", "green", "", *(caption_of(number) for number in range(4, 40))]
    records = write_squares(tmp_path / "records", range(40), seed=0, captions=texts)
    train_judge(judge_config(records, tmp_path / "judge", steps=1))
    known = Judge.load("judge", str(tmp_path / "judge")).captions
    red, green = sorted(COLOURS).index("red"), sorted(COLOURS).index("green")
    assert known.stated[known.rows["a drawing"]].tolist() == [red, UNKNOWN]
    assert np.isnan(known.right[known.rows["a drawing"]]).tolist() == [False, True, False]
    assert known.stated[known.rows["green"]].tolist() == [green, 0]
    assert "" not in known.rows


def test_none_is_an_answer_but_no_statement(squares: str, tmp_path: Path) -> None:
    table = pq.read_table(Path(squares, "data-00000.parquet"))
    index = table.schema.get_field_index("count")
    (tmp_path / "records").mkdir()
    hidden = ["none" if row % 4 < 2 else value for row, value in enumerate(table.column("count").to_pylist())]
    pq.write_table(table.set_column(index, "count", pa.array(hidden)), tmp_path / "records" / "data-00000.parquet")
    found = train_judge(judge_config(str(tmp_path / "records"), tmp_path / "judge", steps=1))
    assert found["classes"]["count"] == ["1", "2", "none"]
    assert found["accuracy"]["count"]["pictures"] == 120
    assert 0 <= found["accuracy"]["count"]["none_right"] <= 1
    known = Judge.load("judge", str(tmp_path / "judge")).captions
    assert (known.stated[:, 1] == UNKNOWN).sum() == 120
    assert (known.stated[:, 0] == UNKNOWN).sum() == 0


def test_what_is_there_is_not_trained_again_and_the_end_is_the_same(squares: str, tmp_path: Path) -> None:
    out = tmp_path / "judge"
    config = judge_config(squares, out, steps=2)
    first = train_judge(config)
    before = contents(out)
    assert before.keys() == {"config.json", "network-0.safetensors", "network-1.safetensors"} | {
        "captions.parquet",
        "judge.json",
    }
    assert train_judge(config) == json.loads(before["judge.json"])
    for name in ("judge.json", "captions.parquet", "network-1.safetensors"):
        (out / name).unlink()
    kept = (out / "network-0.safetensors").stat().st_mtime_ns
    assert train_judge(config)["sha256"] == first["sha256"]
    assert (out / "network-0.safetensors").stat().st_mtime_ns == kept
    assert contents(out) == before
    with pytest.raises(ConfigError, match="steps = 2, now it is 3"):
        train_judge(config.merged({"steps": 3}))


def test_it_is_refused_before_any_work(squares: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="records: required"):
        train_judge(judge_config(squares, tmp_path / "out", records=[]))
    with pytest.raises(DataError, match="'hair'"):
        train_judge(judge_config(squares, tmp_path / "out", attributes=["hair"]))
    one = write_squares(tmp_path / "one", range(0, 12, 6), seed=0)
    with pytest.raises(ConfigError, match="attributes: 'colour' has one class that can be learned"):
        train_judge(judge_config(one, tmp_path / "out", attributes=["colour"]))
    with pytest.raises(ConfigError, match=r"^device = 'graphics': "):
        train_judge(judge_config(squares, tmp_path / "out", device="graphics"))
    assert job.main(["--set", f"records=[{squares}]", "--set", "attributes=[colour]", "--set", "out="]) == 2
    assert "out: required" in capsys.readouterr().err
    given = [f"records=[{squares}]", f"out={tmp_path / 'out'}", "attributes=[colour, count]"]
    assert job.main([*(argument for value in given for argument in ("--set", value)), "--dry-run"]) == 0
    assert "240 pictures; classes: colour 3, count 2" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/*"))


def test_a_judge_that_is_none_is_refused_by_name(squares: str) -> None:
    with pytest.raises(ConfigError, match=r"judge = .*has no judge\.json"):
        Judge.load("judge", squares)


@pytest.mark.parametrize("name", ["network-1.safetensors", "captions.parquet"])
def test_a_judge_whose_files_were_changed_or_lost_is_refused(squares_judge: str, name: str, tmp_path: Path) -> None:
    shutil.copytree(squares_judge, tmp_path / "judge")
    content = (tmp_path / "judge" / name).read_bytes()
    (tmp_path / "judge" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"^judge = .*its files are not those that judge\.json was written for"):
        Judge.load("judge", str(tmp_path / "judge"))
    (tmp_path / "judge" / name).unlink()
    with pytest.raises(ConfigError, match=rf"^judge = .*is not whole: .*{name}"):
        Judge.load("judge", str(tmp_path / "judge"))


def test_augmentation_leaves_colours_and_sides(squares: str) -> None:
    picture = np.full((500, 64, 64, 3), 255, dtype=np.uint8)
    picture[:, 24:40, 8:24] = (255, 0, 0)
    ink = augment(as_ink(picture), torch.Generator().manual_seed(0))
    red, green, blue = ink.mean(dim=(0, 2, 3)).tolist()
    assert red == pytest.approx(0, abs=1e-3)  # red paint has no ink in the red channel
    assert green == pytest.approx(blue, rel=1e-2)
    assert 0.7**2 < green / (16 * 16 / 64**2) < 1.15**2
    columns = ink[:, 1].sum(dim=1)
    centres = (columns * torch.arange(64)).sum(dim=1) / columns.sum(dim=1)
    assert centres.mean().item() == pytest.approx(31.5 - 16 * (0.7 + 1.15) / 2, abs=0.5)
    assert centres.max() < 36  # a quarter to the left of the middle, moved by 15% at most
    assert not torch.equal(ink[0], ink[1])


def test_logits_are_of_each_attribute() -> None:
    network = JudgeNetwork([5, 2, 3], width=2)
    assert [tuple(logits.shape) for logits in network(torch.rand(4, 3, 32, 32))] == [(4, 5), (4, 2), (4, 3)]


def test_the_best_constant_is_the_best_of_all_pictures() -> None:
    """Against every picture that there is one of, tried one by one."""
    random = np.random.default_rng(0)
    stated = random.integers(-1, 3, size=(60, 3))
    shares = [
        np.mean([all(s in (UNKNOWN, p) for s, p in zip(row, kind, strict=True)) for row in stated]) for kind in stated
    ]
    assert best_constant(stated) == pytest.approx(max(shares))
    assert all_right(stated, stated).all()
    assert all_right(np.array([[UNKNOWN, 1]]), np.array([[2, 1]])).tolist() == [True]
    assert all_right(np.array([[0, 1]]), np.array([[2, 1]])).tolist() == [False]
