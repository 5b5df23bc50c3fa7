"""The server's benchmarks ask for the pictures that they say, on every side, and sum up what they hear. No time is judged."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psutil
import pytest
from benchmarks.engine.load import Row, requests_of
from benchmarks.serving.batched import DRAWS, How, request_of
from benchmarks.serving.batching import Curve, compared
from benchmarks.serving.clients import Client, body_of
from benchmarks.serving.load import memory_of, summary
from benchmarks.serving.one_process import running_in_one_process
from benchmarks.serving.overhead import EngineAlone, measure, requests_of_one_kind, told
from tests.support.bundles import save_tiny_bundle
from tests.support.engines import assert_same_pictures

from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request
from unclip.generation.engine.route import Stages
from unclip.generation.engine.worker import EngineThread
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.serving.config import LimitsConfig, ServeConfig
from unclip.serving.drawing import orders
from unclip.serving.messages.schemas import GenerationBody
from unclip.serving.stages.model import Model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("bundles") / "tiny")
    save_tiny_bundle(uri)
    return uri


def test_both_servers_are_asked_for_the_picture_of_the_request(bundle: str) -> None:
    model = Model.load(bundle, GenerationOptions())
    for request in requests_of(8, 16, random.Random(0)):
        body = json.loads(json.dumps(body_of(request)))
        order = orders.generation(GenerationBody.model_validate(body), model, LimitsConfig())
        assert (order.side, list(order.requests)) == (16, [request])
        assert request_of(body) == request


@pytest.mark.parametrize("how", DRAWS)
def test_batched_pictures_are_those_of_their_requests(bundle: str, how: How) -> None:
    pipeline = Pipeline.from_bundle(bundle)
    trees = [{"decoder": {"num_inference_steps": steps}, "up_to": 16} for steps in (2, 4, 2)]
    asked = [
        Request(prompt=f"{seed} dogs", seed=seed, options=GenerationOptions().merged(tree))
        for seed, tree in enumerate(trees)
    ]
    made = DRAWS[how](pipeline, asked)
    for picture, request in zip(made, asked, strict=True):
        alone = pipeline([request.prompt or ""], [request.seed], options=request.options).images[16][0]
        assert_same_pictures({16: picture}, {16: np.asarray(alone)})


def test_the_engine_and_the_app_in_a_process_of_its_own_draw_what_is_measured(bundle: str) -> None:
    requests = requests_of_one_kind(3, 16, decoder_steps=2, prior_steps=2)
    config = ServeConfig.from_dict({"bundle": bundle})
    engine = Engine(Stages.of(Pipeline.from_bundle(bundle)), EngineConfig())
    with EngineThread(engine) as worker, running_in_one_process(config, threads=1) as url, Client(url) as client:
        found = measure({"engine": EngineAlone(worker), "app": client}, requests, rounds=1, alone=2)
        with pytest.raises(RuntimeError, match=r"answered \{400\}, not 200"):
            client.one(Request(prompt="a dog", options=GenerationOptions(up_to=48)))
    assert worker.metrics().finished == 3 + 2 + 3
    assert [len(found[name]["seconds"]) for name in ("engine", "app")] == [2, 2]
    assert told(found)["app"]["added_ms"] == pytest.approx(found["app"]["p50_ms"] - found["engine"]["p50_ms"])


def test_users_hear_pictures_and_refusals() -> None:
    """Every third request is refused."""
    with refusing_every(3) as url:
        command = [sys.executable, "-m", "benchmarks.serving.users", url, "--rate", "100", "--seconds", "1"]
        done = subprocess.run(
            [*command, "--users", "8"], input='[{"seed": 7}]', capture_output=True, text=True, timeout=60
        )
    heard = json.loads(done.stdout.splitlines()[-1])
    refused = [row for row in heard if row["status"] == 503]
    assert len(heard) >= 3
    assert len(refused) == len(heard) // 3
    assert {row["retry_after"] for row in refused} == {"4"}
    assert {row["status"] for row in heard} == {200, 503}


def test_a_load_is_summed_up() -> None:
    heard = [{"asked": float(number), "status": 200, "seconds": 2.0, "retry_after": None} for number in range(9)]
    heard += [{"asked": 9.5, "status": 503, "seconds": 0.5, "retry_after": after} for after in ("1", None)]
    found = summary(heard)
    assert found["statuses"] == {"200": 9, "503": 2}
    assert (found["asked_per_second"], found["images_per_second"]) == (11 / 9.5, 0.9)
    assert (found["accepted"]["p95"], found["refused"]["p50"], found["without_retry_after"]) == (2.0, 0.5, 1)


def test_memory_is_that_of_the_process() -> None:
    with memory_of(psutil.Process()) as sizes:
        pass
    assert sizes[0] == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.2)


def test_curves_are_compared_with_the_first_one() -> None:
    def at(name: str, factor: float) -> Curve:
        rows = [Row(name, share, factor * share, 0.5, 1 + share, 3.0) for share in (0.5, 1.0, 2.0)]
        return Curve(factor, rows)

    levels = compared({"unclip": at("unclip", 3.0), "grouped": at("grouped", 2.0)})
    assert {(level.first, level.other) for level in levels} == {("unclip", "grouped")}
    assert [level.ratio for level in levels] == pytest.approx([1.5] * len(levels))


@contextmanager
def refusing_every(number: int) -> Iterator[str]:
    """A server that knows nothing but whom to refuse."""
    lock, count = threading.Lock(), 0

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal count
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                count += 1
                refused = count % number == 0
            self.send_response(503 if refused or asked != {"seed": 7} else 200)
            self.send_header("content-length", "0")
            if refused:
                self.send_header("retry-after", "4")
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
