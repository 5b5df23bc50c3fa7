"""Who may ask, how much, and what is said where something is wrong, as the official client hears it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from tests.support.serving import RunningApp, held_up, png_of, running_app, wait_until

from unclip.serving.api.app import create_app
from unclip.serving.config import ConceptConfig, LimitsConfig, PolicyConfig, ServeConfig
from unclip.serving.guards.keys import hash_key

PROMPT = "a red heart"
KEYS = {"uk-few": {"requests_per_minute": 1.0}, "uk-many": {"requests_per_minute": 1e6, "pictures_at_once": 3}}


@pytest.fixture(scope="module")
def guarded(tiny_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """Keys, small limits, and a policy."""
    folder: Path = tmp_path_factory.mktemp("guarded")
    records = [{"id": key[3:], "sha256": hash_key(key), **limits} for key, limits in KEYS.items()]
    (folder / "keys.json").write_text(json.dumps({"keys": records}))
    (folder / "blocked.txt").write_text("forbidden thing\n")
    config = ServeConfig(
        bundle=tiny_bundle,
        keys=str(folder / "keys.json"),
        limits=LimitsConfig(pictures=4, body_bytes=100_000, picture_pixels=100),
        policy=PolicyConfig(blocklist=str(folder / "blocked.txt")),
    )
    with running_app(config) as running:
        yield running


def client_of(app: RunningApp, key: str) -> OpenAI:
    return OpenAI(base_url=f"{app.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(guarded: RunningApp) -> OpenAI:
    return client_of(guarded, "uk-many")


@pytest.mark.parametrize("key", ["uk-none", "few"])
def test_keys_that_are_not_known_are_refused(guarded: RunningApp, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client_of(guarded, key).models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"


def test_without_a_key_there_are_pictures_and_pages_but_no_api(guarded: RunningApp, client: OpenAI) -> None:
    url = client.images.generate(prompt=PROMPT, response_format="url", size="16x16").data[0].url
    assert httpx.get(url).status_code == 200
    assert httpx.get(f"{guarded.url}/health").json() == {"status": "ok", "reasons": []}
    assert httpx.get(f"{guarded.url}/openapi.json").status_code == 200
    assert httpx.get(f"{guarded.url}/").status_code == 200
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 401
    assert httpx.post(f"{guarded.url}/v1/images/generations", json={"prompt": PROMPT}).status_code == 401
    assert httpx.get(f"{guarded.url}/v1/nothing").status_code == 401


@pytest.mark.parametrize("prefix", ["", "/one", "/one/two"])
def test_keys_are_asked_for_wherever_the_app_is_mounted(guarded: RunningApp, prefix: str) -> None:
    async def status(path: str, key: str | None) -> int:
        mounted = httpx.ASGITransport(create_app(guarded.service), root_path=prefix)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=mounted, base_url="http://here") as asking:
            return (await asking.get(f"{prefix}{path}", headers=headers)).status_code

    assert asyncio.run(status("/v1/models", None)) == 401
    assert asyncio.run(status("/v1/models", "uk-many")) == 200
    assert asyncio.run(status("/v1/pictures/none.png", None)) == 404


def test_keys_have_a_rate(guarded: RunningApp) -> None:
    few = client_of(guarded, "uk-few")
    few.models.list()
    with pytest.raises(openai.RateLimitError) as caught:
        few.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert guarded.meters.value("unclip_serve_key_limited", key="few", limit="requests") == 1


def test_keys_have_a_number_of_pictures(guarded: RunningApp, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, n=4)
    assert (caught.value.param, caught.value.code) == ("n", "too_many_pictures")
    with held_up(guarded), client.images.generate(prompt=PROMPT, n=2, stream=True) as stream:
        answer = iter_of(stream)  # kept: without it the connection may be closed
        next(answer)
        with pytest.raises(openai.RateLimitError) as limited:
            client.images.generate(prompt=PROMPT, n=2)
        assert int(limited.value.response.headers["retry-after"]) >= 1
    wait_until(lambda: guarded.service.admission.in_flight == 0)


def iter_of(stream: object) -> Iterator[bytes]:
    """What comes before the first event: the server has taken the request on."""
    return stream.response.iter_bytes()  # type: ignore[attr-defined]


def test_a_full_server_refuses_at_once_and_takes_on_again(app: RunningApp, tiny_bundle: str) -> None:
    with running_app(ServeConfig(bundle=tiny_bundle, limits=LimitsConfig(pictures=2))) as small:
        client = client_of(small, "none")
        with held_up(small) as held:
            with client.images.generate(prompt=PROMPT, n=2, stream=True) as stream:
                answer = iter_of(stream)  # kept: without it the connection may be closed
                next(answer)
                with pytest.raises(openai.InternalServerError) as caught:
                    client.images.generate(prompt=PROMPT)
                assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
                assert int(caught.value.response.headers["retry-after"]) >= 1
            wait_until(lambda: small.service.admission.in_flight == 0)
            held.let_go()
        assert len(client.images.generate(prompt=PROMPT, n=2).data) == 2
        with pytest.raises(openai.BadRequestError) as too_many:
            client.images.generate(prompt=PROMPT, n=3)
        assert too_many.value.param == "n"
        assert small.meters.value("unclip_serve_refused", reason="overloaded") == 1


def test_time_that_is_over(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt=PROMPT, extra_body={"timeout_s": 1e-3})
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")


def test_unknown_models_and_pictures(guarded: RunningApp, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")
    for name in ("nothing", "..%2F..%2Fetc%2Fpasswd", "0000000000-aaaaaaaaaaaaaaaaaaaaaaaaaa.png"):
        answer = httpx.get(f"{guarded.url}/v1/pictures/{name}")
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("changes", [{}, {"extra_body": {"negative_prompt": "forbidden thing"}, "prompt": "a"}])
def test_the_policy_refuses_prompts(client: OpenAI, changes: dict) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "some Forbidden  thing", "size": "16x16", **changes})
    assert caught.value.code == "content_policy_violation"


def test_the_policy_looks_at_what_was_drawn_and_at_what_was_given(tiny_bundle: str) -> None:
    everything = ConceptConfig(name="everything", texts=("a",), picture_threshold=-1)
    with running_app(ServeConfig(bundle=tiny_bundle, policy=PolicyConfig(concepts=(everything,)))) as strict:
        client = client_of(strict, "none")
        with pytest.raises(openai.BadRequestError, match="a picture that was made") as caught:
            client.images.generate(prompt=PROMPT)
        assert caught.value.code == "content_policy_violation"
        with pytest.raises(openai.BadRequestError, match="a picture of the request"):
            client.images.create_variation(image=("a.png", png_of(np.zeros((16, 16, 3), np.uint8))))
        told: list[str] = []
        with pytest.raises(openai.APIError, match="a picture that was made"):
            told += [event.type for event in client.images.generate(prompt=PROMPT, stream=True, partial_images=2)]
        assert told == []


def test_bodies_and_pictures_are_bounded(guarded: RunningApp, client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.create_variation(image=("a.png", bytes(100_001)))
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    with pytest.raises(openai.APIStatusError) as large:
        client.images.create_variation(image=("a.png", png_of(np.zeros((11, 11, 3), np.uint8))))
    assert (large.value.status_code, large.value.param) == (413, "image")


GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


def of_type(content_type: str, content: bytes) -> dict:
    return {"content": content, "headers": {"content-type": content_type}}


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "code"),
    [
        ("POST", GENERATIONS, of_type("application/json", b"{"), 400, "invalid_json"),
        ("POST", GENERATIONS, of_type("application/json", b'{"prompt": "\xff"}'), 400, "invalid_json"),
        ("POST", GENERATIONS, of_type("application/json", b"[]"), 400, "invalid_value"),
        ("POST", GENERATIONS, {"json": {}}, 400, "missing_required_parameter"),
        ("POST", GENERATIONS, {"data": {"prompt": "a"}}, 400, "invalid_content_type"),
        ("POST", EDITS, {"json": {"prompt": "a"}}, 400, "invalid_content_type"),
        ("POST", EDITS, of_type("multipart/form-data; boundary=a", b"nothing"), 400, None),
        ("POST", EDITS, of_type("multipart/form-data", b"nothing"), 400, None),
        ("GET", GENERATIONS, {}, 405, "method_not_allowed"),
        ("GET", "/v1/images/nothing", {}, 404, "not_found"),
        ("GET", "/v1/models/", {}, 404, "not_found"),
    ],
)
def test_requests_that_are_none(
    app: RunningApp, method: str, path: str, sent: dict, status: int, code: str | None
) -> None:
    answer = httpx.request(method, app.url + path, **sent)
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert error.keys() == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code


def test_a_wrong_method_is_told_the_right_ones(app: RunningApp) -> None:
    assert httpx.get(app.url + GENERATIONS).headers["allow"] == "POST"
    health = httpx.head(f"{app.url}/health")
    assert (health.status_code, health.content) == (200, b"")


def test_pictures_of_one_request_count_together(guarded: RunningApp, client: OpenAI) -> None:
    """Each may have 100 pixels, and all of them four times as many."""
    picture = base64.b64encode(png_of(np.zeros((10, 10, 3), dtype=np.uint8))).decode()
    sent = {"model": "unclip", "input": []}
    assert len(client.embeddings.create(**sent, extra_body={"images": [picture] * 4}).data) == 4
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(**sent, extra_body={"images": [picture] * 5})
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


def test_many_who_ask_for_health_are_one_check(app: RunningApp) -> None:
    asked: list[int] = []

    async def check() -> None:
        asked.append(1)
        raise RuntimeError("broken")

    async def answers() -> list[httpx.Response]:
        broken = httpx.ASGITransport(create_app(replace(app.service, checks=[check])))
        async with httpx.AsyncClient(transport=broken, base_url="http://here") as client:
            return list(await asyncio.gather(*(client.get("/health") for _ in range(100))))

    found = asyncio.run(answers())
    assert [answer.status_code for answer in found] == [503] * 100
    assert found[0].json() == {"status": "failing", "reasons": ["RuntimeError: broken"]}
    assert len(asked) < 50


def test_answers_name_their_request_and_guard_themselves(app: RunningApp) -> None:
    chosen = httpx.get(f"{app.url}/v1/models", headers={"x-request-id": "mine-7"})
    assert chosen.headers["x-request-id"] == "mine-7"
    for bad in ("", "a b", "a" * 200, "ä"):
        answer = httpx.get(f"{app.url}/v1/models", headers={"x-request-id": bad.encode()})
        assert answer.headers["x-request-id"].startswith("req-")
    assert chosen.headers["x-content-type-options"] == "nosniff"
    assert chosen.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in chosen.headers["content-security-policy"]
    assert (
        "access-control-allow-origin" not in httpx.get(f"{app.url}/v1/models", headers={"origin": "http://a"}).headers
    )


def test_every_request_is_counted_and_has_one_line_in_the_log_without_its_content(
    guarded: RunningApp, client: OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    route = "/v1/images/generations"
    before = guarded.meters.value("unclip_serve_requests", route=route, status="200")
    with caplog.at_level(logging.INFO, "unclip.serving"):
        client.images.generate(prompt="a very private prompt", size="16x16")
        wait_until(lambda: "request" in [record.getMessage() for record in caplog.records])
    [line] = [record for record in caplog.records if record.getMessage() == "request"]
    assert (line.unclip_fields["route"], line.unclip_fields["status"]) == (route, 200)
    assert "private" not in str([vars(record) for record in caplog.records])
    assert guarded.meters.value("unclip_serve_requests", route=route, status="200") == before + 1
    assert guarded.meters.observations("unclip_serve_request_seconds", route=route) >= 1
    assert guarded.meters.value("unclip_serve_in_flight") == 0
