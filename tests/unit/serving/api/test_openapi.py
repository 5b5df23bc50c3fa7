"""The OpenAPI page says what the server does: schemathesis asks by it, and compares."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Collection
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from tests.support.serving import RunningApp, png_of

OPERATIONS = [
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("POST", "/v1/images/variations"),
    ("POST", "/v1/images/interpolations"),
    ("POST", "/v1/images/text-diffs"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1/pictures/{name}"),
    ("GET", "/health"),
]
UP_TO_THE_MODEL = {
    *("model", "size", "n", "frames", "num_inference_steps", "timeout_s", "image_embed", "options", "images", "mask"),
    *("stream", "partial_images", "progress", "prior"),
}
"""Fields of which the page cannot say what fits this model and server, or each other."""
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_headers_conformance,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.missing_required_header,
]


@pytest.fixture(scope="session")
def page(app: RunningApp) -> dict[str, Any]:
    return httpx.get(f"{app.url}/openapi.json").json()


@pytest.fixture(scope="session")
def api(app: RunningApp) -> Any:
    half = np.arange(20)[:, None].repeat(20, axis=1) < 10
    pictures = [png_of(np.full((20, 20, 3), value, np.uint8), half) for value in (0, 80, 160)]
    schemathesis.openapi.format("binary", strategies.sampled_from(pictures))
    found = schemathesis.openapi.from_url(f"{app.url}/openapi.json")
    found.config.seed = 7
    return found


def ask(strategy: Any, *further: Any, without: Collection[str] = ()) -> Counter[int]:
    """Asks what `strategy` makes up, the same in every run; the statuses of the answers.

    Args:
        further: checks beside `CHECKS`.
        without: fields of bodies that are left out.
    """
    statuses: Counter[int] = Counter()

    @given(case=strategy)
    @settings(
        max_examples=15,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def answered(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body = {name: value for name, value in case.body.items() if name not in without}
        statuses[case.call_and_validate(checks=[*CHECKS, *further], timeout=60).status_code] += 1

    answered()
    return statuses


def what_is_wrong_is_refused(ctx: Any, response: Any, case: Any) -> bool | None:
    """But a number for a text in a form: what is sent there is text either way."""
    mutations = getattr(case.meta.phase.data, "mutations", ())
    kinds = {mutation.operator.name for mutation in mutations}
    if case.media_type == "multipart/form-data" and kinds == {"CHANGE_TYPE"}:
        return None
    return schemathesis.checks.negative_data_rejection(ctx, response, case)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_whatever_is_asked_is_answered_as_the_page_says(api: Any, method: str, path: str) -> None:
    ask(api[path][method].as_strategy(), without={"model"})


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "POST"])
def test_what_the_model_can_do_is_done(api: Any, path: str) -> None:
    enough = 1 if path.endswith("embeddings") else 2  # which needs one of two fields, as the page cannot say either
    assert ask(api[path]["POST"].as_strategy(), without=UP_TO_THE_MODEL)[200] >= enough


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if one[0] == "POST"])
def test_what_the_page_does_not_allow_is_refused(api: Any, method: str, path: str) -> None:
    wrong = api[path][method].as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    ask(wrong, what_is_wrong_is_refused)


def test_all_operations_are_asked(page: dict[str, Any]) -> None:
    assert sorted(OPERATIONS) == sorted(
        (method.upper(), path) for path, methods in page["paths"].items() for method in methods
    )


def test_every_field_and_route_is_explained(page: dict[str, Any]) -> None:
    for path, methods in page["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            for content in operation.get("requestBody", {}).get("content", {}).values():
                for name, field in content["schema"]["properties"].items():
                    assert field.get("description") or field.get("format") == "binary" or "items" in field, (path, name)


def test_errors_are_ours_and_never_the_frameworks(page: dict[str, Any]) -> None:
    for path, methods in page["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            for status, answer in operation["responses"].items():
                if int(status) >= 400 and path != "/health":
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")
    assert not {"HTTPValidationError", "ValidationError"} & page["components"]["schemas"].keys()


def test_references_lead_somewhere(page: dict[str, Any]) -> None:
    found: list[str] = []

    def search(node: Any) -> None:
        if isinstance(node, dict):
            found.extend(value for key, value in node.items() if key == "$ref")
            for value in node.values():
                search(value)
        elif isinstance(node, list):
            for value in node:
                search(value)

    search(page)
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in page["components"]["schemas"]


def test_binary_and_event_answers_have_their_media_types(page: dict[str, Any]) -> None:
    picture = page["paths"]["/v1/pictures/{name}"]["get"]["responses"]["200"]["content"]
    assert picture.keys() == {"image/png", "image/jpeg", "image/webp"}
    for path in ("/v1/images/generations", "/v1/images/edits"):
        answer = page["paths"][path]["post"]["responses"]["200"]["content"]
        assert answer.keys() == {"application/json", "text/event-stream"}


def test_the_page_for_people_has_every_route_and_nothing_of_other_hosts(app: RunningApp, page: dict[str, Any]) -> None:
    answer = httpx.get(f"{app.url}/docs")
    assert answer.headers["content-type"].startswith("text/html")
    style = answer.text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in answer.headers["content-security-policy"]
    for path in page["paths"]:
        assert path in answer.text
    assert "<script" not in answer.text
    assert "://" not in answer.text
