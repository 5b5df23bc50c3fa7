"""A list of requests, looked through before anything is made of it: what is wrong with all of it, and what with single lines."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, TextIO

from pydantic import Field, ValidationError

from unclip.config.base import Config
from unclip.data.sources.base import is_utf8
from unclip.data.sources.lists import Record, read_records
from unclip.serving.api.forms import invalid
from unclip.serving.batches.objects import ENDPOINT, ListError
from unclip.serving.config import ServeConfig
from unclip.serving.drawing.orders import generation
from unclip.serving.errors import ApiError, InvalidRequest, NotFound
from unclip.serving.messages.schemas import Form, GenerationBody
from unclip.serving.stages.model import Model
from unclip.utils import storage

MAX_ERRORS = 100
"""What is wrong with a list is told up to so many times."""
_MAX_ID = 512
_BLOCK = 256
_FIELDS = ("custom_id", "method", "url", "body")
_NOT_BY_LINE: Mapping[str, Any] = {
    "stream": False,
    "partial_images": 0,
    "progress": False,
    "prior": "prior",
    "negative_prompt": None,
    "image_embed": None,
    "include": None,
    "options": None,
    "timeout_s": None,
}
"""Fields of a request that the bulk job has for all lines or for none, with the values that change nothing."""

Verdicts = Callable[[Sequence[str]], Sequence[ApiError | None]]
"""What the content policy has against each of some prompts."""


class Shape(Config):
    """How a line's pictures are handed out."""

    side: int = Field(ge=1)
    """Side in pixels; they may be drawn larger."""
    form: Form
    """How they are encoded."""
    compression: int | None
    """Quality of JPEG and WebP."""
    by_address: bool
    """Whether files are written and named, or they come inside of the answer."""


class Ask(Config):
    """A line of prompts.jsonl: columns of the bulk job, and what it carries along."""

    id: str
    """The client's own, unique in the list."""
    prompt: str
    """What to draw."""
    seed: int
    """Of the first picture."""
    n: int
    """Pictures."""
    size: int
    """Side in pixels of what is drawn."""
    guidance_scale: float | None
    """The decoder's."""
    num_inference_steps: int | None
    """The decoder's."""
    shape: Shape
    """What becomes of the pictures."""
    parameters: dict[str, Any]
    """Fields of a request that draws the first of them again."""


@dataclass(frozen=True)
class Refused:
    """A line of refused.jsonl: one that cannot be done, and the answer to it."""

    custom_id: str
    status: int
    body: Mapping[str, Any]

    @classmethod
    def of(cls, custom_id: str, error: ApiError) -> Refused:
        """As the error says."""
        return cls(custom_id, error.status, error.body)


def check_list(uri: str, most: int) -> tuple[int, list[ListError]]:
    """How many lines a list has, and what is wrong with it as a whole: then nothing is made of any line.

    Raises `OSError` where it cannot be read.
    """
    errors: list[ListError] = []
    seen: set[bytes] = set()
    total = 0
    for record in read_records(uri):
        total += 1
        if total > most:
            return total, [ListError(code="too_many_requests", message=f"the list has more than {most} lines")]
        if len(errors) < MAX_ERRORS:
            error = _wrong_line(record, seen)
            errors += [error] if error else []
    if not total:
        errors = [ListError(code="empty_file", message="the list has no lines")]
    return total, errors


def _wrong_line(record: Record, seen: set[bytes]) -> ListError | None:
    """Why a line is no request; `seen` are digests of the ids before."""
    line, values = record.number + 1, record.values

    def wrong(code: str, message: str, param: str | None = None) -> ListError:
        return ListError(code=code, message=message, line=line, param=param)

    if record.problem is not None:
        return wrong("invalid_json_line", f"the line is no request: {record.problem[:200]}")
    for name in _FIELDS:
        if name not in values:
            return wrong("missing_required_parameter", f"{name}: required, but not given", name)
    custom_id = values["custom_id"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID or not _is_plain(custom_id):
        message = (
            f"custom_id = {reprlib.repr(custom_id)}: must be a text of 1 to {_MAX_ID} characters, not all of them blank"
        )
        return wrong("invalid_custom_id", message, "custom_id")
    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    if digest in seen:
        return wrong(
            "duplicate_custom_id", f"custom_id = {reprlib.repr(custom_id)}: another line has it too", "custom_id"
        )
    seen.add(digest)
    if values["method"] != "POST":
        return wrong("invalid_method", f"method = {reprlib.repr(values['method'])}: must be POST", "method")
    if values["url"] != ENDPOINT:
        return wrong("invalid_url", f"url = {reprlib.repr(values['url'])}: must be {ENDPOINT}, as the batch's", "url")
    if not isinstance(values["body"], dict):
        return wrong("invalid_request", "body: must be a JSON object", "body")
    return None


def _is_plain(text: str) -> bool:
    return bool(text.strip()) and is_utf8(text)


class LineReader:
    """Reads what single lines ask for.

    Args:
        model: that the bulk job draws with.
        salt: what the seeds of lines that give none come from, with the number of the line: the same list in the same batch
            asks for the same pictures whoever reads it.
    """

    def __init__(self, config: ServeConfig, model: Model, salt: str) -> None:
        self._config, self._model, self._salt = config, model, salt

    def read(self, record: Record) -> Ask:
        """Raises `ApiError` where that cannot be done; `check_list` has nothing against the line."""
        body = self._body(record)
        order = generation(body, self._model, self._config.limits)
        first = order.requests[0]
        assert first.prompt is not None
        assert first.options.up_to is not None
        return Ask(
            id=record.values["custom_id"],
            prompt=first.prompt,
            seed=first.seed,
            n=len(order.requests),
            size=first.options.up_to,
            guidance_scale=body.guidance_scale,
            num_inference_steps=body.num_inference_steps,
            shape=Shape(
                side=order.side,
                form=body.output_format or "png",
                compression=body.output_compression,
                by_address=body.response_format == "url",
            ),
            parameters=order.repeats(0),
        )

    def _body(self, record: Record) -> GenerationBody:
        """As the API reads it, with a seed, and without anything that is not for single lines."""
        try:
            body = GenerationBody.model_validate_json(json.dumps(record.values["body"]), strict=True)
        except ValidationError as error:
            raise invalid(error, GenerationBody) from None
        except ValueError as error:
            raise InvalidRequest(f"body: {error}", code="invalid_value", param="body") from None
        config = self._config
        if body.model not in (None, config.model, *config.aliases):
            message = f"model = {body.model!r}: there is no such model; this server has {config.model}"
            raise NotFound(message, code="model_not_found", param="model")
        for name, neutral in _NOT_BY_LINE.items():
            if getattr(body, name) not in (None, neutral):
                raise InvalidRequest(f"{name}: is not for batches", code="unsupported_parameter", param=name)
        return body if body.seed is not None else body.model_copy(update={"seed": self._seed(record.number)})

    def _seed(self, number: int) -> int:
        digest = hashlib.blake2b(f"{self._salt}/{number}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big")


def divide_list(
    uri: str, reader: LineReader, verdicts: Verdicts, *, prompts: str, refused: str, after_block: Callable[[], None]
) -> int:
    """Writes the lines that can be done to `prompts` and the others to `refused`; how many the latter are.

    Args:
        uri: a list that `check_list` has nothing against.
        after_block: called now and then; what it raises ends the work, and neither file is there.
    """
    count = 0
    with ExitStack() as files:
        asks, answers = (_open(files, target) for target in (prompts, refused))
        records = read_records(uri)
        while block := list(islice(records, _BLOCK)):
            for line in _judged(block, reader, verdicts):
                if isinstance(line, Refused):
                    count += 1
                    answers.write(json.dumps(vars(line)) + "\n")
                else:
                    asks.write(json.dumps(line.to_dict()) + "\n")
            after_block()
    return count


def _open(files: ExitStack, uri: str) -> TextIO:
    path = files.enter_context(storage.local_target(uri))
    return files.enter_context(path.open("w", encoding="utf-8"))


def _judged(block: Sequence[Record], reader: LineReader, verdicts: Verdicts) -> list[Ask | Refused]:
    lines: list[Ask | Refused] = []
    for record in block:
        try:
            lines.append(reader.read(record))
        except ApiError as error:
            lines.append(Refused.of(record.values["custom_id"], error))
    asks = [place for place, line in enumerate(lines) if isinstance(line, Ask)]
    found = verdicts([line.prompt for line in lines if isinstance(line, Ask)])
    for place, against in zip(asks, found, strict=True):
        if against is not None:
            lines[place] = Refused.of(block[place].values["custom_id"], against)
    return lines
