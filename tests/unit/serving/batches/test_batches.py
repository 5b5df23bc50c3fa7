"""Batches by the official client over HTTP, the bulk job for real in a thread."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
from tests.support.batches import ThreadRunner, client_of, line, lines_of, running_batches, submit, wait_for
from tests.support.bundles import save_tiny_bundle

from unclip.pipelines.pipeline import Pipeline
from unclip.serving.batches import batches as batches_module
from unclip.serving.batches import work
from unclip.serving.batches.lines import check_list
from unclip.serving.batches.work import BatchWork
from unclip.serving.config import ServeConfig
from unclip.serving.guards.keys import KeyFile, KeyRecord, hash_key, new_key
from unclip.serving.pictures.encoding import Encoder
from unclip.utils import storage


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny")
    save_tiny_bundle(uri)
    return uri


@pytest.fixture
def config(bundle: str, tmp_path: Path) -> ServeConfig:
    return ServeConfig.from_dict({"bundle": bundle, "device": "cpu", "batches": {"folder": str(tmp_path / "batches")}})


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Units of two lines, and nobody waits long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "_LINES_PER_UNIT", 2)
        patch.setattr(batches_module, "LOOK_S", 0.1)
        patch.setattr(work, "LOOK_S", 0.05)
        patch.setattr(work, "_WAITS_S", (0.05, 0.1))
        patch.setattr(work, "MOST_ATTEMPTS", 2)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the server that many tests share."""
    return str(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def shared(bundle: str, folder: str, _quick: None) -> Iterator[OpenAI]:
    """Refuses prompts with one word."""
    storage.write_bytes(f"{folder}/blocked.txt", b"violence\n")
    fields = {"batches": {"folder": folder}, "policy": {"blocklist": f"{folder}/blocked.txt"}}
    with server(ServeConfig.from_dict({"bundle": bundle, "device": "cpu", **fields})) as client:
        yield client


@contextmanager
def server(config: ServeConfig, runner: ThreadRunner | None = None) -> Iterator[OpenAI]:
    assert config.batches.folder is not None
    with running_batches(config, runner or ThreadRunner(config.batches.folder)) as url:
        yield client_of(url)


def picture(answer: dict[str, Any]) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(answer["b64_json"])))
    return np.asarray(image.convert("RGB")).astype(int)


def generate(client: OpenAI, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/images/generations", body=body, cast_to=object)
    assert isinstance(answer, dict)
    return answer


def test_answers_are_those_of_the_api(shared: OpenAI, folder: str, bundle: str) -> None:
    lines = [
        line("plain", prompt="a red heart", seed=7),
        line("several", prompt="a blue star", n=3, seed=11, size="16x16", guidance_scale=3.0, num_inference_steps=4),
        line("no seed", prompt="a red heart", model="dall-e-2", output_format="jpeg", output_compression=90),
        line("between", prompt="a red heart", seed=7, size="20x20"),
        line("address", prompt="a red heart", seed=7, response_format="url"),
    ]
    batch = submit(shared, lines, metadata={"for": "a test"})
    assert (batch.object, batch.endpoint, batch.metadata) == ("batch", "/v1/images/generations", {"for": "a test"})
    batch = wait_for(shared, batch.id)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 5, "completed": 5, "failed": 0}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
    answers = lines_of(shared, batch.output_file_id)
    live = {each["custom_id"]: generate(shared, each["body"]) for each in lines[:2]}
    repeated = generate(shared, answers[2]["response"]["body"]["data"][0]["parameters"])
    assert [answer["custom_id"] for answer in answers] == [each["custom_id"] for each in lines]
    assert all(answer["error"] is None and answer["response"]["status_code"] == 200 for answer in answers)
    bodies = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    for name, theirs in live.items():
        assert bodies[name].keys() == theirs.keys()
        for mine, other in zip(bodies[name]["data"], theirs["data"], strict=True):
            assert mine.keys() == other.keys()
            assert (mine["seed"], mine["parameters"]) == (other["seed"], other["parameters"])
            assert np.abs(picture(mine) - picture(other)).max() <= 1
        assert {key: bodies[name][key] for key in ("size", "model", "revision", "output_format")} == {
            key: theirs[key] for key in ("size", "model", "revision", "output_format")
        }
    expected = Pipeline.from_bundle(bundle, "cpu")(["a red heart"], [7]).images[32][0].astype(int)
    assert np.abs(picture(bodies["plain"]["data"][0]) - expected).max() <= 1
    by_area = expected.repeat(5, 0).repeat(5, 1).reshape(20, 8, 20, 8, 3).mean((1, 3))
    assert np.abs(picture(bodies["between"]["data"][0]) - by_area).max() <= 1
    file = Path(bodies["address"]["data"][0]["url"])
    assert file.is_relative_to(folder)
    assert np.abs(np.asarray(Image.open(file)).astype(int) - expected).max() <= 1
    jpeg = Image.open(io.BytesIO(base64.b64decode(bodies["no seed"]["data"][0]["b64_json"])))
    assert (jpeg.format, jpeg.size) == ("JPEG", (32, 32))
    same = Image.open(io.BytesIO(base64.b64decode(repeated["data"][0]["b64_json"])))
    assert np.abs(np.asarray(same).astype(int) - np.asarray(jpeg)).mean() < 1


def test_single_lines_are_refused_as_the_api_does(shared: OpenAI) -> None:
    bad = {
        "no prompt": ({}, "prompt", "missing_required_parameter"),
        "unknown": ({"prompt": "a", "promt": "b"}, "promt", "unknown_parameter"),
        "type": ({"prompt": "a", "n": "2"}, "n", "invalid_value"),
        "many": ({"prompt": "a", "n": 11}, "n", "invalid_value"),
        "size": ({"prompt": "a", "size": "64x64"}, "size", "invalid_size"),
        "steps": ({"prompt": "a", "num_inference_steps": 1001}, "num_inference_steps", "invalid_value"),
        "model": ({"prompt": "a", "model": "dall-e-3"}, "model", "model_not_found"),
        "stream": ({"prompt": "a", "stream": True}, "stream", "unsupported_parameter"),
        "negative": ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt", "unsupported_parameter"),
        "embed": ({"prompt": "a", "image_embed": [1.0]}, "image_embed", "unsupported_parameter"),
        "prior": ({"prompt": "a", "prior": "none"}, "prior", "unsupported_parameter"),
        "refused": ({"prompt": "Violence!"}, None, "content_policy_violation"),
        "control": ({"prompt": "a\u0007b"}, "prompt", "invalid_value"),
    }
    lines = [line(name, **body) for name, (body, _, _) in bad.items()] + [
        line("good", prompt="a", stream=False, n=None)
    ]
    batch = wait_for(shared, submit(shared, lines).id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 14, "completed": 1, "failed": 13}
    assert [answer["custom_id"] for answer in lines_of(shared, batch.output_file_id)] == ["good"]
    errors = {each["custom_id"]: each["response"] for each in lines_of(shared, batch.error_file_id)}
    assert errors.keys() == bad.keys()
    for name, (_, param, code) in bad.items():
        error = errors[name]["body"]["error"]
        assert (error["param"], error["code"]) == (param, code), name
        assert error["type"] == "invalid_request_error"
        assert errors[name]["status_code"] == (404 if name == "model" else 400)


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([], "empty_file", None),
        ([json.dumps(line("a", prompt="a")), "{"], "invalid_json_line", 2),
        (["[1]"], "invalid_json_line", 1),
        ([json.dumps(line("a", prompt="a"))] * 2, "duplicate_custom_id", 2),
        ([json.dumps(line("a", prompt="a") | {"url": "/v1/chat/completions"})], "invalid_url", 1),
        ([json.dumps(line("a", prompt="a") | {"method": "GET"})], "invalid_method", 1),
        ([json.dumps(line(" ", prompt="a"))], "invalid_custom_id", 1),
        ([json.dumps({"custom_id": "a"})], "missing_required_parameter", 1),
        ([json.dumps(line("a") | {"body": "a"})], "invalid_request", 1),
        ([json.dumps(line(str(number), prompt="a")) for number in range(5)], "too_many_requests", None),
    ],
)
def test_what_is_wrong_with_a_list(tmp_path: Path, lines: list[str], code: str, number: int | None) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(lines))
    _, errors = check_list(str(path), 4)
    assert [(error.code, error.line) for error in errors] == [(code, number)]


def test_a_list_that_is_broken_fails_as_a_whole(shared: OpenAI, folder: str) -> None:
    lines = [line("a", prompt="a"), line("a", prompt="b"), line("b", prompt="b") | {"url": "/"}]
    batch = submit(shared, lines)
    assert batch.status == "validating"
    batch = wait_for(shared, batch.id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.data is not None
    found = [(error.line, error.code, error.param) for error in batch.errors.data]
    assert found == [(2, "duplicate_custom_id", "custom_id"), (3, "invalid_url", "url")]
    assert "pictures" not in storage.names(f"{folder}/batches/{batch.id}")


def test_cancelling_hands_out_what_is_done(config: ServeConfig) -> None:
    first_unit_done, go_on = threading.Event(), threading.Event()
    units = 0

    def before_unit() -> None:
        nonlocal units
        units += 1
        if units == 2:
            first_unit_done.set()
            assert go_on.wait(60)

    names = [str(number) for number in range(8)]
    runner = ThreadRunner(str(config.batches.folder), before_unit)
    with server(config, runner) as client:
        batch = submit(client, [line(name, prompt=name) for name in names])
        assert first_unit_done.wait(60)
        running = wait_for(
            client, batch.id, lambda batch: bool(batch.request_counts and batch.request_counts.completed)
        )
        assert (running.status, running.request_counts.completed) == ("in_progress", 2)
        assert client.batches.cancel(batch.id).status == "cancelling"
        assert runner.makings[0].stopped.wait(60)
        go_on.set()
        batch = wait_for(client, batch.id)
        assert (batch.status, batch.completed_at) == ("cancelled", None)
        assert batch.cancelling_at <= batch.cancelled_at
        done, left = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
        assert client.batches.cancel(batch.id).status == "cancelled"
    assert [each["custom_id"] for each in done] == names[:2]
    assert [each["custom_id"] for each in left] == names[2:]
    assert {each["error"]["code"] for each in left} == {"batch_cancelled"}
    assert all(each["response"] is None for each in left)
    assert batch.request_counts.to_dict() == {"total": 8, "completed": 2, "failed": 6}


def test_one_of_another_cluster_who_comes_late_leaves_the_answers_as_they_are(config: ServeConfig) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Late:
        """Has nothing to say until the batch has ended."""

        def wait(self, seconds: float) -> bool:
            begun.set()
            return go_on.wait(60)

        def stop(self) -> None:
            pass

    names = [str(number) for number in range(3)]

    def before_unit() -> None:
        assert begun.wait(60)

    runner = ThreadRunner(str(config.batches.folder), before_unit)
    with server(config, runner) as client:
        batch = submit(client, [line(name, prompt=name) for name in names])
        while not runner.makings:
            time.sleep(0.01)
        late = threading.Thread(target=BatchWork(runner.folder, batch.id, lambda job: Late(), Encoder(None)).run)
        late.start()
        batch = wait_for(client, batch.id)
        runner.threads[batch.id].join()  # the pictures are away
        go_on.set()
        late.join()
        assert client.batches.retrieve(batch.id) == batch
        assert [each["custom_id"] for each in lines_of(client, batch.output_file_id)] == names
        assert batch.error_file_id is None


def test_attempts_that_fail_are_made_again_and_none_without_end(config: ServeConfig) -> None:
    calls: list[int] = []

    def before_unit() -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            raise OSError("the storage is away")
        if len(calls) > 4:
            raise RuntimeError("broken")

    names = [str(number) for number in range(10)]
    with server(config, ThreadRunner(str(config.batches.folder), before_unit)) as client:
        batch = wait_for(client, submit(client, [line(name, prompt=name) for name in names]).id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert [(error.code, error.message) for error in batch.errors.data] == [("server_error", work.NOT_MADE)]
        done, left = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert [each["custom_id"] for each in done] == names[:6]  # one unit, then two more
    assert [each["custom_id"] for each in left] == names[6:]
    assert {each["error"]["code"] for each in left} == {"batch_failed"}
    assert len(calls) == 5 + work.MOST_ATTEMPTS


def test_batches_go_on_in_a_new_process_in_their_order(config: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process takes requests and ends before it has looked through one; its worker dies with another."""
    folder = str(config.batches.folder)
    holding, held = threading.Event(), threading.Event()

    def hold(*arguments: Any, **named: Any) -> Any:
        held.set()
        holding.wait(60)
        raise batches_module._Stopped

    class NoRunner:
        def start(self, batch_id: str) -> None:
            pass

    with running_batches(config, NoRunner()) as url:
        client = client_of(url)
        first = submit(client, [line("a", prompt="a"), line("b", prompt="b")])
        wait_for(client, first.id, lambda batch: batch.status == "in_progress")
        monkeypatch.setattr(batches_module, "check_list", hold)
        second = submit(client, [line("c", prompt="c")])
        assert held.wait(60)
        holding.set()
    monkeypatch.undo()
    monkeypatch.setattr(batches_module, "LOOK_S", 0.1)
    monkeypatch.setattr(batches_module, "_SILENT_S", 0.3)
    runner = ThreadRunner(folder)
    with server(config, runner) as client:
        assert [batch.id for batch in client.batches.list()] == [second.id, first.id]
        assert wait_for(client, first.id).status == "completed"
        assert wait_for(client, second.id).status == "completed"
        third = submit(client, [line("d", prompt="d")])
        assert wait_for(client, third.id).status == "completed"
    assert list(dict.fromkeys(runner.started)) == [first.id, second.id, third.id]


def test_a_batch_whose_time_is_over_is_answered(shared: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "WINDOW_S", -1)
    batch = wait_for(shared, submit(shared, [line("a", prompt="a")]).id)
    assert (batch.status, batch.request_counts.failed) == ("expired", 1)
    assert batch.expired_at is not None
    [left] = lines_of(shared, batch.error_file_id)
    assert (left["custom_id"], left["error"]["code"]) == ("a", "batch_expired")


def test_files(config: ServeConfig) -> None:
    with server(config.merged({"batches": {"max_bytes": 4096}})) as client:
        files = [client.files.create(file=(f"{n}.jsonl", b"x" * (n + 1)), purpose="batch") for n in range(5)]
        assert [(file.filename, file.bytes, file.purpose) for file in files[:1]] == [("0.jsonl", 1, "batch")]
        page = client.files.list(limit=2, order="asc")
        assert [file.id for file in page.data] == [file.id for file in files[:2]]
        assert [file.id for file in page] == [file.id for file in files]  # the client turns the pages
        assert [file.id for file in client.files.list()] == [file.id for file in reversed(files)]
        assert not client.files.list(purpose="batch_output").data
        assert client.files.retrieve(files[1].id) == files[1]
        assert client.files.content(files[2].id).content == b"xxx"
        assert client.files.delete(files[2].id).deleted
        for name in (files[2].id, "file-..", "..%2f..%2fetc", "file-" + 48 * "0"):
            with pytest.raises(openai.NotFoundError):
                client.files.retrieve(name)
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=("large.jsonl", b"x" * 4097), purpose="batch")
        assert refused.value.status_code == 413
        with pytest.raises(openai.BadRequestError, match="purpose"):
            client.files.create(file=("a.jsonl", b"x"), purpose="fine-tune")
        with pytest.raises(openai.BadRequestError, match="expires_after"):
            client.files.create(
                file=("a.jsonl", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
            )
        assert len(client.files.list().data) == 4
    assert not list(Path(str(config.batches.folder)).rglob("*.tmp"))


def test_what_a_batch_cannot_be(shared: OpenAI) -> None:
    there = len(list(shared.batches.list()))
    file = shared.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": "/v1/images/generations", "completion_window": "24h"}
    too_much = {str(number): "" for number in range(17)}
    for field, value in {"endpoint": "/v1/embeddings", "completion_window": "1h", "metadata": too_much}.items():
        with pytest.raises(openai.BadRequestError, match=field) as refused:
            shared.batches.create(**(asked | {field: value}))
        assert refused.value.param == field
    over = wait_for(shared, submit(shared, [line("a", prompt="")]).id)
    with pytest.raises(openai.BadRequestError, match="purpose batch"):
        shared.batches.create(**(asked | {"input_file_id": over.error_file_id}))
    with pytest.raises(openai.NotFoundError):
        shared.batches.create(**(asked | {"input_file_id": "file-none"}))
    with pytest.raises(openai.NotFoundError):
        shared.batches.retrieve("batch-none")
    with pytest.raises(openai.NotFoundError):
        shared.batches.cancel("batch-none")
    assert len(list(shared.batches.list())) == there + 1
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled any more"):
        shared.batches.cancel(over.id)


def test_pictures_that_nobody_could_check_are_not_made(config: ServeConfig) -> None:
    concepts = [{"name": "hearts", "texts": ["a heart"], "picture_threshold": 0.9}]
    with server(config.merged({"policy": {"concepts": concepts}})) as client:
        with pytest.raises(openai.BadRequestError, match="content policy") as refused:
            submit(client, [line("a", prompt="a")])
        assert refused.value.code == "batches_unavailable"
        assert not client.batches.list().data


def test_what_belongs_to_one_key_is_not_there_for_another(config: ServeConfig, tmp_path: Path) -> None:
    mine, theirs = new_key(), new_key()
    records = [
        KeyRecord(id=name, sha256=hash_key(key), requests_per_minute=10_000)
        for name, key in {"me": mine, "them": theirs}.items()
    ]
    storage.write_json(str(tmp_path / "keys.json"), KeyFile(keys=tuple(records)).to_dict())
    folder = str(config.batches.folder)
    with running_batches(config.merged({"keys": str(tmp_path / "keys.json")}), ThreadRunner(folder)) as url:
        me, them = client_of(url, mine), client_of(url, theirs)
        batch = wait_for(me, submit(me, [line("a", prompt="a")]).id)
        assert batch.status == "completed"
        assert batch.output_file_id is not None
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "uk-nobody").batches.list()
        assert not them.batches.list().data
        assert not them.files.list().data
        for ask in (
            lambda: them.batches.retrieve(batch.id),
            lambda: them.batches.cancel(batch.id),
            lambda: them.files.content(str(batch.output_file_id)),
            lambda: them.files.delete(batch.input_file_id),
            lambda: them.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/images/generations", completion_window="24h"
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        assert {file.purpose for file in me.files.list()} == {"batch", "batch_output"}
