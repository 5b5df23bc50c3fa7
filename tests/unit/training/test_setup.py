"""What is wrong with a run is said before it starts: naming field and value, and leaving no run folder behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.embedded import save_clip

from unclip.config.base import ConfigError
from unclip.data.batches import make_batch
from unclip.data.labels import distinct_labels
from unclip.data.manifest import DataError, read_slices, scan
from unclip.models.clip import load_clip
from unclip.models.normalizer import paper_scale
from unclip.pipelines.bundle import BundleError
from unclip.recipes import RECIPES
from unclip.recipes.clip import tiny_architecture
from unclip.training.config import TrainConfig
from unclip.training.in_process import embed_here
from unclip.training.run_folder import RunFolder
from unclip.training.setup import check_outputs, clip_reference, prepare_run


@dataclass
class Place:
    """A folder with records, their embeddings and the CLIP that made them."""

    root: Path
    records: str
    embedded: str
    clip: str

    def config(self, stage: str = "prior", recipe: str = "debug", **changes: Any) -> TrainConfig:
        data = self.embedded if stage in ("prior", "decoder") else self.records
        places = {"run": str(self.root / "run"), "bundle": str(self.root / "bundle"), "data": {"path": data}}
        places |= {"clip": self.clip} if stage in ("prior", "decoder") else {}
        return RECIPES[stage][recipe]().merged(places).merged(changes)  # type: ignore[index]

    def refuses(self, error: type[Exception], *words: str, **changes: Any) -> None:
        """Whether `prepare_run` raises `error` with all `words` in its message, before anything is written."""
        config = self.config(**changes)
        with pytest.raises(error) as caught:
            prepare_run(config)
        for word in words:
            assert word in str(caught.value)
        assert not Path(config.run).exists()


@pytest.fixture(scope="module")
def made(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("setup")
    clip = save_clip(str(root / "first"), tiny_architecture())
    records = f"{openmoji}/64/train"
    return Place(root, records, embed_here(records, str(root / "embedded"), clip), clip)


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    return Place(tmp_path, made.records, made.embedded, made.clip)


@pytest.fixture
def edited(place: Place) -> Callable[..., str]:
    """`edited(key=value)`: a copy of the embedded folder with other facts; None takes a fact away."""

    def edit(**facts: Any) -> str:
        folder = place.root / "edited"
        shutil.copytree(place.embedded, folder)
        stored = json.loads((folder / "manifest.json").read_text()) | facts
        kept = {name: fact for name, fact in stored.items() if fact is not None}
        (folder / "manifest.json").write_text(json.dumps(kept))
        return str(folder)

    return edit


def test_a_good_run_is_fitted_to_its_clip_and_writes_nothing(place: Place) -> None:
    prepared = prepare_run(place.config(objective={"normalization": "whiten"}))
    config, clip = prepared.config, load_clip(place.clip)
    assert not (place.root / "run").exists()
    assert (config.clip, config.clip_fingerprint) == (place.clip, clip.fingerprint)
    statistics = json.loads(Path(place.embedded, "manifest.json").read_text())["statistics"]
    normalizer = config.objective.stage_config().normalizer  # type: ignore[union-attr]
    assert normalizer.mean == pytest.approx(tuple(statistics["mean"]))
    assert normalizer.std == pytest.approx(tuple(statistics["std"]))
    assert prepared.spec.columns() == ("id", "caption", "image_embed", "text_embed")
    assert [manifest.rows for manifest in prepared.manifests] == [48]
    assert prepared.order.chunk_rows == 48  # not the 256 that are asked for: there are no more rows
    reference = clip_reference(config)
    assert reference is not None
    assert reference.fingerprint == clip.fingerprint


def test_embeddings_of_the_stream_need_no_columns_but_what_clip_sees(place: Place) -> None:
    prepared = prepare_run(place.config(data={"path": place.records, "embeddings": "stream"}))
    assert prepared.spec.columns() == ("id", "image", "caption")
    assert (prepared.spec.clip_image_size, prepared.spec.clip_tokenizer) == (32, place.clip)
    assert prepared.config.clip_fingerprint == load_clip(place.clip).fingerprint
    assert prepared.config.objective.stage_config().normalizer == paper_scale(16)  # type: ignore[union-attr]


def test_upsamplers_have_no_clip(place: Place) -> None:
    prepared = prepare_run(place.config(stage="upsampler_256"))
    assert clip_reference(prepared.config) is None


def test_relative_paths_become_absolute(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    config = prepare_run(place.config(run="here", bundle="there")).config
    assert config.run == str(place.root / "here")
    assert config.bundle == str(place.root / "there")


# --- data -------------------------------------------------------------------------------------------------------------


def test_missing_and_empty_data(place: Place) -> None:
    place.refuses(ConfigError, "data.path: required", data={"path": ""})
    nowhere = str(place.root / "nowhere")
    place.refuses(DataError, nowhere, "does not exist", data={"path": nowhere})
    Path(nowhere).mkdir()
    place.refuses(DataError, nowhere, "no *.parquet file", data={"path": nowhere})


def test_missing_columns(place: Place) -> None:
    place.refuses(DataError, "no column 'image_embed', 'text_embed'", place.records, data={"path": place.records})


def test_embeddings_of_unknown_origin(place: Place, edited: Callable[..., str]) -> None:
    folder = edited(clip=None)
    place.refuses(DataError, folder, "does not say which CLIP", "data.embeddings=stream", data={"path": folder})


def test_a_global_batch_larger_than_the_data(place: Place) -> None:
    place.refuses(
        ConfigError, "loop.global_batch_size = 64", place.embedded, "only 48 rows", loop={"global_batch_size": 64}
    )


# --- a mix of sources -------------------------------------------------------------------------------------------------


def with_other(path: str, **other: Any) -> dict[str, Any]:
    return {"others": [{"path": path, **other}]}


def test_a_mix_is_prepared_source_by_source(place: Place, edited: Callable[..., str]) -> None:
    """A run's share of each source, its report, and the spread of what a batch holds."""
    ours = json.loads(Path(place.embedded, "manifest.json").read_text())["statistics"]
    mean, std = np.array(ours["mean"]), np.array(ours["std"])
    other = edited(statistics={"mean": (-mean).tolist(), "std": std[::-1].tolist()})
    config = place.config(data=with_other(other, weight=3), objective={"normalization": "whiten"})
    prepared = prepare_run(config)
    assert [manifest.uri for manifest in prepared.manifests] == [place.embedded, other]
    assert prepared.order.taken(1) == (1, 3)
    normalizer = prepared.config.objective.stage_config().normalizer  # type: ignore[union-attr]
    draws = np.random.default_rng(0)
    is_ours = draws.random((200_000, 1)) < 1 / 4
    noise = draws.normal(size=(200_000, len(mean)))
    batches = np.where(is_ours, mean + std * noise, -mean + std[::-1] * noise)
    np.testing.assert_allclose(normalizer.mean, batches.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(normalizer.std, batches.std(axis=0), rtol=0.01)
    first, second = prepared.data_report(samples_seen=4 * 50)
    assert first == {
        "path": place.embedded,
        "rows": 48,
        "samples": 50,
        "whole_epochs": 1,
        "left_out": 0,
        "untrained": 46,
    }
    assert (second["samples"], second["whole_epochs"], second["untrained"]) == (150, 3, 42)


def test_a_source_alone_reports_what_its_epochs_leave_out(place: Place) -> None:
    prepared = prepare_run(place.config(loop={"global_batch_size": 10, "microbatch_size": 10}))
    (report,) = prepared.data_report(samples_seen=80)
    assert (report["rows"], report["left_out"], report["whole_epochs"], report["untrained"]) == (48, 8, 2, 0)


def test_relative_sources_become_absolute(place: Place, edited: Callable[..., str], monkeypatch: Any) -> None:
    monkeypatch.chdir(Path(edited()).parent)
    config = prepare_run(place.config(data=with_other("edited"))).config
    assert config.data.others[0].path == str(place.root / "edited")


def test_sources_that_cannot_be_mixed(place: Place, edited: Callable[..., str]) -> None:
    place.refuses(ConfigError, "data.others.0.path", "is data.path already", data=with_other(place.embedded))
    stored = json.loads(Path(place.embedded, "manifest.json").read_text())["clip"]
    other = edited(clip=stored | {"fingerprint": "f" * 64})
    place.refuses(ConfigError, "another CLIP", place.embedded, other, "ffffffffffff…", data=with_other(other))
    words = ("data.others.0.weight", "less than one sample")
    place.refuses(ConfigError, *words, data=with_other(other, weight=0.1) | {"embeddings": "stream"})
    place.refuses(DataError, "does not exist", data=with_other(f"{other}/none"))


def test_sources_whose_columns_differ(place: Place, labelled: Callable[..., str]) -> None:
    first, second = labelled(group=pa.array(["a", "b"])), labelled(group=pa.array([1, 2]))
    data = {"data": {"path": first} | with_other(second)}
    message = f"{second!r}: column 'group' is int64, in {first} string"
    place.refuses(DataError, message, **classifier(first, label_column="group") | data)


def test_open_classes_are_those_of_all_sources(place: Place, labelled: Callable[..., str]) -> None:
    folders = [labelled(number=pa.array(values)) for values in ([1, 2], [2, 3])]
    config = place.config(
        **classifier(folders[0], label_column="number") | {"data": {"path": folders[0]} | with_other(folders[1])}
    )
    assert prepare_run(config).spec.classes == ("1", "2", "3")


# --- CLIP -------------------------------------------------------------------------------------------------------------


def test_another_clip_than_that_of_the_embeddings(place: Place) -> None:
    other = save_clip(str(place.root / "other"), tiny_architecture(), seed=1)
    place.refuses(ConfigError, f"clip = {other!r}", load_clip(place.clip).fingerprint[:12], place.embedded, clip=other)


def test_a_clip_that_is_not_there(place: Place) -> None:
    place.refuses(ConfigError, "clip = 'ViT-B-33'", "ViT-B-32", clip="ViT-B-33")


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_model_for_embeddings_of_another_width(place: Place, stage: str) -> None:
    model = {"stage": {"model": {"embed_dim": 32}}}
    place.refuses(ConfigError, "objective.stage.model.embed_dim = 32", "set it to 16", stage=stage, objective=model)


TEXT_STATES = {"context_length": 16, "state_dim": 32}  # of the tiny architecture


@pytest.fixture
def told_states(place: Place) -> Callable[..., dict[str, Any]]:
    """`told_states(name=value)`: changes for a decoder that takes text states, of another shape in the fields given."""

    def changes(**fields: int) -> dict[str, Any]:
        states = TEXT_STATES | {"width": 32} | fields
        return {"stage": "decoder", "objective": {"stage": {"model": {"text": None, "text_states": states}}}}

    return changes


@pytest.mark.parametrize(("field", "value"), [("context_length", 8), ("state_dim", 64)])
def test_text_states_of_another_shape(
    place: Place, told_states: Callable[..., dict[str, Any]], field: str, value: int
) -> None:
    """Half as many tokens of twice the width are as many numbers, so the columns alone do not tell."""
    changes = told_states(**{field: value})
    data = embed_here(place.records, str(place.root / "states"), place.clip, text_states=True)
    words = (f"objective.stage.model.text_states.{field} = {value}", f"set it to {TEXT_STATES[field]}")
    place.refuses(ConfigError, *words, data, **changes, data={"path": data})
    stream = {"path": place.records, "embeddings": "stream"}
    place.refuses(ConfigError, *words, repr(place.clip), **changes, data=stream)


def test_text_states_that_nobody_vouches_for(place: Place, told_states: Callable[..., dict[str, Any]]) -> None:
    place.refuses(DataError, "no column 'text_states'", **told_states())
    data = Path(embed_here(place.records, str(place.root / "states"), place.clip, text_states=True))
    assert prepare_run(place.config(**told_states(), data={"path": str(data)})).spec.embeddings[-1] == "text_states"
    facts = json.loads((data / "manifest.json").read_text())
    del facts["clip"]["text_states"]
    (data / "manifest.json").write_text(json.dumps(facts))
    words = ("objective.stage.model.text_states", str(data), "jobs/embed.py")
    place.refuses(ConfigError, *words, **told_states(), data={"path": str(data)})


def test_whitening_needs_statistics(place: Place, edited: Callable[..., str]) -> None:
    words = ("objective.normalization = 'whiten'", "statistics")
    whiten = {"normalization": "whiten"}
    place.refuses(ConfigError, *words, objective=whiten, data={"path": edited(statistics=None)})
    place.refuses(ConfigError, *words, objective=whiten, data={"embeddings": "stream"})


def test_embeddings_in_the_stream_need_a_clip(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"data\.embeddings = 'stream' needs a CLIP: set clip"):
        place.config(clip=None, data={"embeddings": "stream"})


def test_a_bundle_of_another_clip(place: Place) -> None:
    """Stages export into one bundle only if their embeddings come from one CLIP."""
    save_clip(str(place.root / "bundle"), tiny_architecture(), seed=1)
    ours = load_clip(place.clip).fingerprint
    theirs = load_clip(str(place.root / "bundle" / "clip")).fingerprint
    place.refuses(BundleError, str(place.root / "bundle"), "'prior'", ours, theirs)
    prepare_run(place.config(stage="upsampler_256"))  # sees no embeddings, so it may


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(place: Place) -> Callable[..., str]:
    """`labelled(column=values)`: a folder with the records in two files and a further column, its values repeated."""

    def write(**columns: pa.Array) -> str:
        folder = place.root / f"labelled-{len(list(place.root.glob('labelled-*')))}"
        folder.mkdir()
        records = scan(place.records)
        slices = [(index, 0, fragment.rows) for index, fragment in enumerate(records.fragments)]
        table = read_slices(records, slices, records.columns)
        for name, values in columns.items():
            rows = pa.array(np.arange(table.num_rows) % len(values))
            table = table.append_column(name, values.take(rows))
        for number, start in enumerate((0, table.num_rows // 2)):
            pq.write_table(table.slice(start, table.num_rows // 2), folder / f"part-{number}.parquet", row_group_size=8)
        return str(folder)

    return write


def classifier(folder: str, **stage: Any) -> dict[str, Any]:
    return {"stage": "classifier", "data": {"path": folder}, "objective": {"stage": stage}}


def test_classes_that_are_left_open_are_those_of_the_data(place: Place, labelled: Callable[..., str]) -> None:
    folder = labelled(number=pa.array([10, 9, 100]))
    prepared = prepare_run(place.config(**classifier(folder, label_column="number")))
    stage = prepared.config.objective.stage_config()
    assert stage.classes == ("10", "100", "9")  # type: ignore[union-attr]
    assert (prepared.spec.label_column, prepared.spec.classes) == ("number", ("10", "100", "9"))
    assert prepared.spec.columns() == ("id", "image", "number")
    table = read_slices(prepared.manifests[0], [(0, 0, 3)], prepared.spec.columns())
    batch = make_batch(table, np.arange(3), prepared.spec, seed=0)
    assert batch["label"].tolist() == [0, 2, 1]
    assert prepare_run(prepared.config).config == prepared.config  # what was filled in is what is checked next time


def test_given_classes_may_be_more_than_the_data_has_but_not_less(place: Place, labelled: Callable[..., str]) -> None:
    folder = labelled(colour_name=pa.array(["red", "green", "blue"]))
    given = ["red", "green", "blue", "black"]
    config = place.config(**classifier(folder, label_column="colour_name", classes=given))
    assert list(prepare_run(config).spec.classes) == given
    place.refuses(
        DataError,
        folder,
        "column 'colour_name' holds 'green', which is none of the 2 classes",
        **classifier(folder, label_column="colour_name", classes=["red", "blue"]),
    )


def test_columns_that_hold_no_classes(place: Place, labelled: Callable[..., str]) -> None:
    folder = labelled(
        constant=pa.array(["same"]),
        holes=pa.array(["a", None, "b"]),
        lists=pa.array([["a"], ["b"]]),
    )
    expected = {
        "constant": (ConfigError, "objective.stage.label_column = 'constant'", "'same'", "needs two classes"),
        "holes": (DataError, "column 'holes' has rows without a value"),
        "lists": (DataError, "column 'lists' is list"),
        "missing": (DataError, "has no column 'missing'"),
    }
    for column, (error, *words) in expected.items():
        place.refuses(error, *words, **classifier(folder, label_column=column))
    manifest = scan(folder, ("hexcode",))
    with pytest.raises(DataError, match="'hexcode' holds more than 20 different values"):
        distinct_labels(manifest, "hexcode", at_most=20)
    assert len(distinct_labels(manifest, "hexcode", at_most=48)) == 48


@pytest.mark.parametrize("stage", ["noised_clip", "classifier"])
def test_guides_have_no_clip_and_fit_any_bundle(place: Place, stage: str) -> None:
    save_clip(str(place.root / "bundle"), tiny_architecture(), seed=1)
    prepared = prepare_run(place.config(stage))
    assert clip_reference(prepared.config) is None
    assert prepared.spec.image_size == 64


# --- run folder and outputs -------------------------------------------------------------------------------------------


def test_a_run_folder_is_required(place: Place) -> None:
    with pytest.raises(ConfigError, match="run: required"):
        prepare_run(place.config(run=""))


def test_a_run_folder_of_another_recipe(place: Place) -> None:
    first = prepare_run(place.config("upsampler_256")).config
    RunFolder(first.run).open(first)
    stored = Path(first.run, "config.json").read_text()
    with pytest.raises(ConfigError) as caught:
        prepare_run(place.config("upsampler_256", "demo"))
    for words in (repr(first.run), "recipe was 'debug', is now 'demo'", "data.shuffle_rows was 256, is now 1024"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="stage was 'upsampler_256', is now 'clip'"):
        prepare_run(place.config("clip"))
    assert Path(first.run, "config.json").read_text() == stored


def test_what_a_continued_run_may_and_may_not_change(place: Place) -> None:
    first = prepare_run(place.config()).config
    RunFolder(first.run).open(first)
    again = {
        "resources": {"num_workers": 2, "data_cpus": 3},
        "loop": {"max_steps": 9, "microbatch_size": 1, "time_limit_s": 5.0, "checkpoint_every_s": 1.0},
        "zero": {"stage": 2},
        "bundle": None,
        "objective": {"stage": {"model": {"activation_checkpointing": True}}},
        "run": str(shutil.move(first.run, place.root / "moved-run")),
    }
    changed = prepare_run(place.config().merged(again)).config
    RunFolder(changed.run).open(changed)
    assert json.loads(Path(changed.run, "config.json").read_text()) == changed.to_dict()
    forbidden: dict[str, dict[str, Any]] = {
        "seed was 0, is now 1": {"seed": 1},
        "optimizer.learning_rate was 0.001, is now 0.002": {"optimizer": {"learning_rate": 2e-3}},
        "loop.global_batch_size was 4, is now 8": {"loop": {"global_batch_size": 8}},
        "objective.text_drop_prob was 0.1, is now 0.2": {"objective": {"text_drop_prob": 0.2}},
        "objective.stage.normalizer.mean was 0.0, is now [": {"objective": {"normalization": "whiten"}},
    }
    for field, change in forbidden.items():
        with pytest.raises(ConfigError) as caught:
            prepare_run(changed.merged(change))
        assert field in str(caught.value)


def test_a_run_that_is_to_be_longer_has_not_ended(place: Place) -> None:
    config = prepare_run(place.config(loop={"max_steps": 9})).config
    run = RunFolder(config.run)
    run.finish({"step": 9, "seconds": 5.0})
    assert run.summary_of(config.loop) == run.summary()
    assert run.summary_of(config.merged({"loop": {"max_steps": 99, "time_limit_s": 5.0}}).loop) is not None
    longer = config.merged({"loop": {"max_steps": 99}})
    assert run.summary_of(longer.loop) is None
    run.open(longer)
    assert run.summary() is None  # nor does it look so to who watches it


def test_a_continued_run_refuses_other_records_and_takes_a_copy_of_its_own(place: Place) -> None:
    folder = place.root / "records"
    shutil.copytree(place.records, folder)
    (folder / "manifest.json").unlink()  # which lists the shards: a folder of somebody else's
    asked = place.config("upsampler_256", data={"path": str(folder)})
    first = prepare_run(asked).config
    RunFolder(first.run).open(first)
    shutil.move(folder, place.root / "moved")
    shutil.copytree(place.root / "moved", folder, copy_function=shutil.copyfile)
    assert prepare_run(asked).config == first
    shutil.copyfile(next(folder.glob("*.parquet")), folder / "zz-more.parquet")
    with pytest.raises(ConfigError, match=rf"data_identity: the records in data\.path = '{folder}' have changed"):
        prepare_run(asked)


@pytest.mark.parametrize("field", ["run", "bundle"])
def test_outputs_that_cannot_be_written(place: Place, field: str) -> None:
    (place.root / "file").write_text("in the way")
    blocked = str(place.root / "file" / "folder")
    config = prepare_run(place.config(**{field: blocked})).config
    with pytest.raises(OSError, match=f"{field} = '{blocked}' cannot be written"):
        check_outputs(config)
    assert not list(place.root.rglob("config.json"))


def test_metrics_of_a_restarted_run_are_those_of_the_run_as_it_went(tmp_path: Path) -> None:
    """Killed after step 4 with a checkpoint of step 2, then stopped by the clock at step 3."""
    run = RunFolder(str(tmp_path / "run"))
    assert run.metrics() == []
    for step, loss in ((1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6), (3, 0.71)):
        run.append(run.metrics_uri, {"step": step, "loss": loss})
    assert run.metrics() == [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.8}, {"step": 3, "loss": 0.71}]
