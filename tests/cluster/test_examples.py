"""What docs/extending.md and the notebook's script teach, as a user would run it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from examples import add_a_source, add_a_stage, colab
from examples.openmoji_pictures import PicturesConfig, write_pictures
from torch.nn import functional

from unclip.cluster.fit import fit
from unclip.cluster.jobs import REFUSED
from unclip.data.manifest import scan
from unclip.generation.outputs import read_png
from unclip.pipelines.bundle import Bundle
from unclip.training.in_process import embed_here

PICTURES = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(PicturesConfig(folder=str(folder), count=PICTURES, size=96))
    return folder


def test_a_source_of_ones_own(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is a record or in the quarantine, in the table's order, and a changed table is another source."""
    texts = sorted(pictures.glob("*.txt"))
    rows = [(text.with_suffix(".png").read_bytes(), text.read_text(encoding="utf-8").strip()) for text in texts]
    rows.insert(5, (b"no picture", "a hole"))
    database = tmp_path / "museum.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE objects (image BLOB, caption TEXT)")
        connection.executemany("INSERT INTO objects VALUES (?, ?)", rows)
    source = f"sources=[{{kind: sqlite, uri: {database}, table: objects, rows_per_part: 4}}]"
    out = tmp_path / "records"
    arguments = ["--set", source, "--set", f"out={out}", "--set", "duplicates.find=exact"]
    assert add_a_source.main(arguments) == 0
    assert f"{PICTURES} records" in capsys.readouterr().out
    assert pq.read_table(out / "data-00000.parquet")["caption"].to_pylist() == [
        text for content, text in rows if content != b"no picture"
    ]
    quarantined = pq.read_table(out / "quarantine").to_pylist()
    assert [(row["key"], row["caption"]) for row in quarantined] == [("6", "a hole")]
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("INSERT INTO objects VALUES (?, ?)", (bytes(100_000), "one more"))
    assert add_a_source.main(arguments) == REFUSED
    assert (
        add_a_source.main(["--set", source.replace("objects", "subjects"), "--set", f"out={tmp_path / 'other'}"]) == 2
    )
    assert "no such table" in capsys.readouterr().err


def test_a_stage_of_ones_own(records: str, tiny_clip: str, tmp_path: Path) -> None:
    """A run of it ends with weights that load and fit the records better than their mean does."""
    config = add_a_stage.demo().merged(
        {
            "run": str(tmp_path / "run"),
            "data": {"path": embed_here(records, str(tmp_path / "embedded"), tiny_clip)},
            "objective": {"stage": {"model": {"width": 0}}},
            "optimizer": {"learning_rate": 0.03, "ema_decay": 0.9, "lr_schedule": "cosine"},
            "loop": {"max_steps": 400, "global_batch_size": 120, "microbatch_size": 120},
        }
    )
    assert fit(config)["step"] == 400
    files = sorted((tmp_path / "embedded").glob("*.parquet"))
    table = pq.read_table(files, columns=["text_embed", "image_embed"])
    z_t, z_i = (torch.from_numpy(np.stack(column.to_numpy())).float() for column in table.columns)
    model = add_a_stage.load(config.run)
    answers = model(z_t).detach()
    assert (z_i - answers).square().sum() < (z_i - z_i.mean(dim=0)).square().sum()
    embeddings = add_a_stage.image_embeddings(model, z_t[:3])
    torch.testing.assert_close(embeddings, functional.normalize(answers[:3], dim=1))


def test_the_notebooks_script(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its debug size, on a folder of pictures."""
    out = tmp_path / "colab"
    arguments = [
        "--pictures",
        str(pictures),
        "--out",
        str(out),
        "--recipe",
        "debug",
        "--prompts",
        "a red heart",
        "a star",
    ]
    assert colab.main(arguments) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"{out}/pictures/grid.png"
    assert scan(f"{out}/records", ("id",)).rows == PICTURES
    assert set(Bundle.load(f"{out}/bundle").configs) == {"clip", "prior", "decoder"}
    assert read_png(f"{out}/pictures/64/00001-0.png").shape == (64, 64, 3)
