"""Servers on Ray Serve as their clients and operators see them: over HTTP through its proxy, in both layouts."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import ray
from openai import OpenAI
from PIL import Image
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from tests.support.bundles import save_tiny_bundle
from tests.support.cluster import wait_for

from unclip.cluster.serve import build
from unclip.pipelines.bundle import Bundle, save_stage

SMALL = {"num_cpus": 0.1}
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "one": {"recipe": "all-in-one", "ingress": SMALL},
    "split": {
        "recipe": "per-stage",
        "ingress": {**SMALL, "min_replicas": 1, "max_replicas": 1},
        "groups": [
            {"stages": ["clip", "prior"], **SMALL},
            {"stages": ["decoder", "upsampler_256", "upsampler_1024"], **SMALL},
        ],
    },
}
DRAWS = {"one": "Ingress", "split": "decoder-upsampler_256"}
"""The deployment that holds the decoder."""
SPLIT = ("Ingress", "clip-prior", "decoder-upsampler_256")
BODY = {"prompt": "a red heart", "seed": 3}
LONG = {**BODY, "num_inference_steps": 1000}
"""Many seconds of work."""


class Server:
    """Both layouts at work under the same address."""

    def __init__(self, url: str, bundle: str) -> None:
        self.url, self._bundle = url, bundle
        self.client = httpx.Client(timeout=120)

    def start(self) -> None:
        """One as `serve run` does it, and one as `serve deploy` does."""
        self.use(self._bundle)
        lists = {"batches.folder": str(Path(self._bundle).parent / "batches")}
        serve.run(build({**LAYOUTS["one"], **lists, "bundle": self._bundle}), name="one", route_prefix="/one")
        wait_for(_split_runs, 120)

    def use(self, bundle: str) -> None:
        """What an operator changes for new weights: `user_config` of each deployment."""
        application = {
            "name": "split",
            "route_prefix": "/split",
            "import_path": "unclip.cluster.serve:build",
            "args": {**LAYOUTS["split"], "bundle": self._bundle},
            "deployments": [{"name": name, "user_config": {"bundle": bundle}} for name in SPLIT],
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    def post(self, layout: str, body: Mapping[str, Any], **options: Any) -> httpx.Response:
        return self.client.post(f"{self.url}/{layout}/v1/images/generations", json=body, **options)

    def revision(self, layout: str) -> str:
        """Of the weights that draw now."""
        answer = self.post(layout, BODY)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["revision"])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three of the same shapes: `first`, `second` with another decoder, and `damaged`."""
    folder = tmp_path_factory.mktemp("bundles")
    first, second, damaged = (str(folder / name) for name in ("first", "second", "damaged"))
    save_tiny_bundle(first)
    bundle = Bundle.load(first)
    decoder = bundle.load_model("decoder")
    clip = bundle.manifests["decoder"].clip
    for number, other in enumerate((second, damaged), start=1):
        shutil.copytree(first, other)
        tensors = {name: tensor + 0.05 * number for name, tensor in decoder.state_dict().items()}
        save_stage(other, bundle.configs["decoder"], tensors=tensors, clip=clip, provenance={})
    weights = Path(damaged) / "decoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return {"first": first, "second": second, "damaged": damaged}


@pytest.fixture(scope="module")
def server(bundles: Mapping[str, str]) -> Iterator[Server]:
    port = _free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        server = Server(f"http://127.0.0.1:{port}", bundles["first"])
        server.start()
        yield server
    finally:
        serve.shutdown()
    wait_for(lambda: not _replicas("one", "Ingress") and not _replicas("split", DRAWS["split"]), 30)


def test_both_layouts_draw_the_same_picture(server: Server) -> None:
    pictures = [_picture(server.post(layout, BODY)) for layout in LAYOUTS]
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].shape == (32, 32, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_have_one_request_id(server: Server, layout: str) -> None:
    answer = server.post(layout, BODY, headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    refusal = server.post(layout, {})
    assert refusal.status_code == 400
    assert len(refusal.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stream", [False, True])
def test_slots_are_free_when_the_client_is_gone(server: Server, layout: str, stream: bool) -> None:
    def ask() -> None:
        with httpx.Client(timeout=2) as client:
            client.post(f"{server.url}/{layout}/v1/images/generations", json={**LONG, "n": 8, "stream": stream})

    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(ask)
        wait_for(lambda: _queued_steps(layout) > 1000, 20)
        with pytest.raises(httpx.ReadTimeout):
            request.result()
    wait_for(lambda: _queued_steps(layout) == 0, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_runs_is_seen_as_queued_steps(server: Server, layout: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(server.post, layout, {**BODY, "num_inference_steps": 100, "n": 4})
        wait_for(lambda: _queued_steps(layout) > 100, 20)
        assert request.result().status_code == 200


def test_lists_of_requests_are_worked_off_beside_the_server(server: Server) -> None:
    """One whose only line is refused: it goes through `Ingress` and the batch's actor, without the bulk job."""
    ask = {"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": {**BODY, "stream": True}}
    with OpenAI(base_url=f"{server.url}/one/v1", api_key="none") as client:
        file = client.files.create(file=("list.jsonl", json.dumps(ask).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h")
        wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
        [line] = client.files.content(client.batches.retrieve(batch.id).error_file_id).text.splitlines()
    assert json.loads(line)["response"]["body"]["error"]["param"] == "stream"


def test_health_tells_of_all_groups(server: Server) -> None:
    for layout in LAYOUTS:
        assert server.client.get(f"{server.url}/{layout}/health").json() == {"status": "ok", "reasons": []}


def test_a_group_that_is_killed_loses_no_request(server: Server) -> None:
    bodies = [{**BODY, "seed": seed, "num_inference_steps": 100} for seed in range(4)]
    expected = [_picture(server.post("one", body)) for body in bodies]
    [killed] = _replicas("split", DRAWS["split"])
    with ThreadPoolExecutor(len(bodies)) as pool:
        requests = [pool.submit(server.post, "split", body) for body in bodies]
        wait_for(lambda: _queued_steps("split") > 0, 20)
        killed.kill()
        for request, picture in zip(requests, expected, strict=True):
            np.testing.assert_array_equal(_picture(request.result()), picture)
    assert killed.pid not in {process.pid for process in _replicas("split", DRAWS["split"])}


def test_weights_change_without_a_pause(server: Server, bundles: Mapping[str, str]) -> None:
    digests = {name: Bundle.load(uri).digest for name, uri in bundles.items()}
    assert server.revision("split") == digests["first"]
    processes = _processes_of_split()

    with _steady_requests(server, "split") as answers:
        server.use(bundles["second"])
        wait_for(lambda: server.revision("split") == digests["second"], 60)
        server.use(bundles["damaged"])
        wait_for(lambda: _logs().count("change_refused") == 2, 60)  # of those who hold the decoder, and who ask them
        server.use(bundles["first"])
        wait_for(lambda: server.revision("split") == digests["first"], 60)
    assert {answer.status_code for answer in answers} == {200}
    revisions = [answer.json()["revision"] for answer in answers]
    assert list(dict.fromkeys(revisions)) == [digests["first"], digests["second"]]
    assert revisions[-1] == digests["first"]
    assert _processes_of_split() == processes


def test_requests_under_way_are_answered_when_the_server_ends(server: Server) -> None:
    body = {**BODY, "num_inference_steps": 200}
    expected = _picture(server.post("one", body))
    with ThreadPoolExecutor(2) as pool:
        requests = {layout: pool.submit(server.post, layout, body) for layout in LAYOUTS}
        for layout in LAYOUTS:
            wait_for(lambda layout=layout: _queued_steps(layout) > 0, 20)
        drained = serve.get_deployment_handle("Ingress", "split").broadcast("drain", 60.0)
        serve.delete("one")
        assert drained.results(timeout_s=60) == [True]
        refused = server.post("split", body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        for request in requests.values():
            np.testing.assert_array_equal(_picture(request.result()), expected)


@contextmanager
def _steady_requests(server: Server, layout: str) -> Iterator[list[httpx.Response]]:
    """One after the other for the whole block, with their answers."""
    stop, answers = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            answers.append(server.post(layout, BODY))

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield answers
        finally:
            stop.set()
        asking.result()


def _picture(answer: httpx.Response) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    [data] = answer.json()["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))))


def _queued_steps(layout: str) -> int:
    handle = serve.get_deployment_handle(DRAWS[layout], layout)
    return int(handle.record_autoscaling_stats.remote().result(timeout_s=30)["queued_steps"])


def _split_runs() -> bool:
    split = serve.status().applications["split"]
    assert split.status != "DEPLOY_FAILED", split.message
    return bool(split.status == "RUNNING")


def _replicas(application: str, deployment: str) -> list[psutil.Process]:
    """The processes of a deployment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:{application}:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _processes_of_split() -> set[int]:
    return {process.pid for name in SPLIT for process in _replicas("split", name)}


def _logs() -> str:
    """What all processes have written to stderr."""
    node = ray._private.worker._global_node
    return "".join(path.read_text(errors="replace") for path in Path(node.get_logs_dir_path()).glob("worker-*.err"))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
