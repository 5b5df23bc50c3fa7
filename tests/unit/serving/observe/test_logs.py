"""Logs: JSON lines that know their request and tell nobody's prompt."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import pytest

from unclip.serving.context import Context, within
from unclip.serving.errors import InvalidRequest
from unclip.serving.observe.logs import configure, event


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[dict]]]:
    """Logs are configured; called, it gives the lines since the last call."""
    logger = logging.getLogger("unclip")
    before = logger.level, logger.propagate, list(logger.handlers)
    configure()
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    logger.setLevel(before[0])
    logger.propagate, logger.handlers[:] = before[1], before[2]


def test_an_event_has_its_request_and_fields(lines) -> None:
    with within(Context(request_id="r1", key_id="k1")):
        event("picture_finished", seconds=1.5, sizes=(64, 256), rate=float("inf"), text="zwei\nZeilen „ä“")
    event("server_started")
    first, second = lines()
    assert first["event"] == "picture_finished"
    assert (first["request_id"], first["key_id"]) == ("r1", "k1")
    assert (first["seconds"], first["sizes"], first["rate"]) == (1.5, [64, 256], "inf")
    assert first["text"] == "zwei\nZeilen „ä“"
    assert (first["level"], first["logger"]) == ("info", "unclip.serving")
    assert first["time"] <= second["time"]
    assert (second["event"], second["request_id"], second["key_id"]) == ("server_started", "-", None)


def test_an_exception_is_fields_with_its_cause(lines) -> None:
    try:
        try:
            _break()
        except ZeroDivisionError as error:
            raise RuntimeError("a stage broke") from error
    except RuntimeError as error:
        event("picture_failed", level=logging.ERROR, error=error)
    (line,) = lines()
    assert line["level"] == "error"
    error = line["error"]
    assert (error["type"], error["message"]) == ("RuntimeError", "a stage broke")
    assert error["cause"]["type"] == "ZeroDivisionError"
    assert error["cause"]["stack"][-1].endswith(" _break")
    assert __file__ in error["cause"]["stack"][-1]


def _break() -> None:
    1 / 0  # noqa: B018


def test_what_a_client_sent_is_not_told(lines) -> None:
    with pytest.raises(ValueError, match="may not have authorization, prompt"):
        event("picture_finished", prompt="a red heart", authorization="Bearer secret")
    event("request_refused", error=InvalidRequest("prompt = 'a red heart': too long", param="prompt", code="too_long"))
    (line,) = lines()
    assert "red heart" not in json.dumps(line)
    assert (line["error"]["code"], line["error"]["param"]) == ("too_long", "prompt")


def test_other_loggers_of_the_package_speak_json_too(lines) -> None:
    with within(Context(request_id="r2")):
        logging.getLogger("unclip.generation.engine.worker").warning("the step has taken %.0f s", 3)
        try:
            _break()
        except ZeroDivisionError:
            logging.getLogger("unclip.utils.s3").exception("broken")
    told, failed = lines()
    assert (told["message"], told["level"], told["request_id"]) == ("the step has taken 3 s", "warning", "r2")
    assert (failed["message"], failed["error"]["type"]) == ("broken", "ZeroDivisionError")


def test_configured_twice_every_line_comes_once(lines) -> None:
    configure(logging.WARNING)
    event("too_quiet")
    event("loud_enough", level=logging.WARNING)
    assert [line["event"] for line in lines()] == ["loud_enough"]
