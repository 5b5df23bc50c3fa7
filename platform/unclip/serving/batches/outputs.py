"""What a batch answers: a file of answers with pictures, and one of errors; each line of the list is in one of them, once.

Units of the bulk job are read one after the other beside the lines that they were made of, so that no more than a few
pictures are in memory. Written again, the files are the same.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, BinaryIO, Literal

import pyarrow.parquet as pq

from unclip.data.sources.lists import read_records
from unclip.generation.bulk.config import PICTURES_PER_PROMPT, GenerateConfig
from unclip.generation.bulk.feeding import ahead
from unclip.generation.bulk.folder import OutputFolder
from unclip.generation.bulk.prompts import Unit, list_prompts, read_unit
from unclip.generation.bulk.receipts import Receipt
from unclip.generation.bulk.shards import QUARANTINE_FOLDER
from unclip.generation.outputs import decode_png
from unclip.serving.batches.folder import BatchFolder, BatchState, StoredBatch, output_ids
from unclip.serving.batches.lines import Ask, Refused
from unclip.serving.errors import ApiError, Failed, InvalidRequest
from unclip.serving.messages.answers import PictureAnswer, PicturesAnswer
from unclip.serving.pictures.encoding import Encoder, scaled
from unclip.serving.pictures.provenance import Label
from unclip.utils import storage

Unanswered = Literal["cancelled", "expired", "failed"]
"""Why lines may have neither pictures nor an error of their own."""
_WHY: Mapping[Unanswered, str] = {
    "cancelled": "the batch was cancelled before this line was done",
    "expired": "this line was not done when the batch's time was over",
    "failed": "the batch ended before this line was done",
}
_READ_PICTURES = 16
_AT_ONCE = 4


@dataclass(frozen=True)
class Written:
    """The files that came of a batch (None where one would be empty), and how many lines each has.

    `unanswered` of those in the file of errors say no more than that nothing was made of them.
    """

    output_file_id: str | None
    error_file_id: str | None
    completed: int
    failed: int
    unanswered: int


def write_outputs(folder: BatchFolder, state: BatchState, why: Unanswered, encoder: Encoder) -> Written:
    """Writes both files, and the pictures that are answered by address.

    Args:
        why: said of lines that nothing was made of.
    """
    batch, unanswered = state.batch, 0
    files = [_Lines(folder, file_id) for file_id in output_ids(batch.id)]
    answers, errors = files
    answerer = _Answerer(folder, batch, encoder)
    with answers, errors, ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="unclip-answers") as threads:
        for record in read_records(folder.batch_uri(batch.id, "refused.jsonl")):
            refused = Refused(**record.values)
            errors.add(_line(batch.id, refused.custom_id, status=refused.status, body=refused.body))
        made = _made(batch.job) if state.rows else ()
        for line in ahead((_Begun(row, threads, answerer) for row in made), 2 * _AT_ONCE):
            if line.row.pictures:
                answers.add(_line(batch.id, line.row.ask.id, status=200, body=line.answer.result()))
            elif line.row.refusal is not None:
                error = _error(**line.row.refusal)
                errors.add(_line(batch.id, line.row.ask.id, status=error.status, body=error.body))
            else:
                unanswered += 1
                told = {"code": f"batch_{why}", "message": _WHY[why]}
                errors.add(_line(batch.id, line.row.ask.id, error=told))
    for lines in files:
        if lines.count:
            name = f"{lines.file_id}.jsonl"
            folder.add_file(lines.file_id, name, size=lines.size, purpose="batch_output", key_id=batch.key_id)
    output_id, error_id = (lines.file_id if lines.count else None for lines in files)
    return Written(output_id, error_id, answers.count, errors.count, unanswered)


class _Lines:
    """A file of lines; it is there when the block ends, unless nothing was added."""

    def __init__(self, folder: BatchFolder, file_id: str) -> None:
        self.file_id, self.count, self.size = file_id, 0, 0
        self._uri, self._open = folder.content_uri(file_id), ExitStack()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(self, line: Mapping[str, Any]) -> None:
        self.count += 1
        self.size += self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    @cached_property
    def _file(self) -> BinaryIO:
        return self._open.enter_context(self._open.enter_context(storage.local_target(self._uri)).open("wb"))


@dataclass(frozen=True)
class _Row:
    """A line that the bulk job was given, and what came of it: pictures, or a refusal, or nothing yet."""

    ask: Ask
    pictures: Sequence[Mapping[str, Any]]
    refusal: Mapping[str, str] | None


def _made(job: GenerateConfig) -> Iterator[_Row]:
    """All lines in their order."""
    units = list_prompts(job).units
    receipts = OutputFolder(job.out, {}, ()).receipts(units)
    for unit in units:
        yield from _made_of_unit(job, unit, receipts.get(unit.index))


def _made_of_unit(job: GenerateConfig, unit: Unit, receipt: Receipt | None) -> Iterator[_Row]:
    refused: dict[int, Mapping[str, str]] = {}
    if receipt is not None and receipt.quarantine is not None:
        for row in _rows(storage.join(job.out, QUARANTINE_FOLDER, receipt.quarantine.file)):
            refused[row["row"]] = {"reason": row["reason"], "detail": row["detail"]}
    shard = receipt.shard if receipt is not None else None
    pictures = _rows(storage.join(job.out, shard.file)) if shard is not None else iter(())
    made = groupby(pictures, key=lambda picture: int(picture["id"]) // PICTURES_PER_PROMPT)
    nothing: tuple[int | None, Iterator[dict[str, Any]]] = (None, iter(()))
    row_number, group = next(made, nothing)
    for number, record in enumerate(read_unit(job, unit), unit.first_row):
        ask = Ask.from_dict(record.values)
        if row_number == number:
            yield _Row(ask, list(group), None)
            row_number, group = next(made, nothing)
        else:
            yield _Row(ask, (), refused.get(number))


class _Answerer:
    """Makes the API's answers of rows with pictures; from any thread."""

    def __init__(self, folder: BatchFolder, batch: StoredBatch, encoder: Encoder) -> None:
        self._folder, self._batch, self._encoder = folder, batch, encoder

    def answer(self, row: _Row) -> dict[str, Any]:
        """JSON values of the body."""
        batch, shape = self._batch, row.ask.shape
        answer = PicturesAnswer(
            created=batch.created_at,
            data=[self._picture(row.ask, picture) for picture in row.pictures],
            output_format=shape.form,
            size=f"{shape.side}x{shape.side}",
            model=batch.model,
            revision=row.pictures[0]["bundle"],
        )
        return answer.model_dump(mode="json", exclude_none=True)

    def _picture(self, ask: Ask, picture: Mapping[str, Any]) -> PictureAnswer:
        batch, shape, seed = self._batch, ask.shape, int(picture["seed"])
        label = Label(batch.model, picture["bundle"], seed, batch.created_at, attribution=batch.attribution)
        pixels = scaled(decode_png(picture["image"]), shape.side)
        content = self._encoder.encode(pixels, form=shape.form, compression=shape.compression, label=label)
        parameters = ask.parameters | {"seed": seed}
        if not shape.by_address:
            told = base64.b64encode(content).decode()
            return PictureAnswer(b64_json=told, seed=seed, revision=picture["bundle"], parameters=parameters)
        uri = self._folder.batch_uri(batch.id, f"images/{picture['id']:012d}.{shape.form}")
        storage.write_bytes(uri, content)
        return PictureAnswer(url=uri, seed=seed, revision=picture["bundle"], parameters=parameters)


class _Begun:
    """A row whose answer is being made, where it has pictures."""

    def __init__(self, row: _Row, threads: ThreadPoolExecutor, answerer: _Answerer) -> None:
        self.row = row
        self.answer: Future[dict[str, Any]] = Future()
        if row.pictures:
            self.answer = threads.submit(answerer.answer, row)


def _rows(uri: str) -> Iterator[dict[str, Any]]:
    """Of a Parquet file, few at a time."""
    with storage.local_file(uri) as path, pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_READ_PICTURES):
            yield from batch.to_pylist()


def _error(reason: str, detail: str) -> ApiError:
    """What the bulk job said against a line, as the API would have."""
    if reason == "failed":
        return Failed("the pictures could not be made", code="generation_failed")
    param = None if reason == "bad_parameters" else "prompt"
    return InvalidRequest(detail, code="invalid_value", param=param)


def _line(
    batch_id: str,
    custom_id: str,
    *,
    status: int | None = None,
    body: Mapping[str, Any] | None = None,
    error: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A line of OpenAI's output files."""
    response = None if status is None else {"status_code": status, "request_id": batch_id, "body": body}
    return {"id": f"{batch_id}/{custom_id}", "custom_id": custom_id, "response": response, "error": error}
