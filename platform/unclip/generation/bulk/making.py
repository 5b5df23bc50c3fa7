"""A unit on its way: rows judged, pictures drawn ahead, scored, the best encoded and written in the order of their ids."""

from __future__ import annotations

import io
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from PIL import Image

from unclip.config.base import ConfigError
from unclip.data.decode import Picture
from unclip.generation.bulk.candidates import Candidates
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.feeding import Feeder, ahead
from unclip.generation.bulk.prompts import Unit, read_unit
from unclip.generation.bulk.rows import Asked, Judge, Refused
from unclip.generation.bulk.scores import Scorer
from unclip.generation.bulk.shards import PictureWriter, png_metadata
from unclip.generation.engine.request import EngineFullError, EngineStoppedError, Request, Ticket
from unclip.generation.outputs import encode_png

_log = logging.getLogger(__name__)

_ENCODED_AHEAD = 8


@dataclass(frozen=True)
class Tools:
    """What the units of a process share.

    Args:
        scorer: None where the bundle has no CLIP.
        window: pictures of a unit that are under way at once.
        bundle: its hash.
    """

    config: GenerateConfig
    judge: Judge
    feeder: Feeder
    scorer: Scorer | None
    encoders: ThreadPoolExecutor
    window: int
    bundle: str


@dataclass(frozen=True)
class _Drawn:
    """A picture by its side in pixels, and how well it fits its prompt."""

    images: Mapping[int, Picture]
    score: float | None

    @property
    def largest(self) -> Picture:
        return self.images[max(self.images)]


class UnitWork:
    """The pictures of one unit.

    Args:
        on_picture: called once for each picture that was drawn.
    """

    def __init__(self, tools: Tools, unit: Unit, on_picture: Callable[[], None]) -> None:
        self._tools, self._unit, self._on_picture = tools, unit, on_picture
        self._lock = threading.Lock()
        self._tickets: set[Ticket] = set()
        self.refused: list[Refused] = []
        self.counts: Counter[str] = Counter(done=0, pictures=0, candidates=0)

    def run(self, writer: PictureWriter) -> None:
        """Makes everything and hands it to `writer`; what is under way is given up where that raises."""
        try:
            for row, number, score, encoding in ahead(self._encoding(writer), _ENCODED_AHEAD):
                if row.has_failed:
                    continue
                row.take(number, score, None if encoding is None else encoding.result())
                if row.is_complete:
                    for kept in row.kept():
                        writer.add(kept)
                    self._complete(row.asked, writer)
        finally:
            with self._lock:
                left = list(self._tickets)
            for ticket in left:
                ticket.cancel()

    def _complete(self, asked: Asked, writer: PictureWriter) -> None:
        writer.complete(asked)
        self.counts.update(done=1, pictures=asked.n, candidates=len(asked.seeds))

    def _rows(self) -> Iterator[Asked]:
        """Those that can be done."""
        records = read_unit(self._tools.config, self._unit)
        for number, record in enumerate(records, self._unit.first_row):
            judged = self._tools.judge.judge(number, record, is_text=self._unit.is_text)
            if isinstance(judged, Refused):
                self.refused.append(judged)
            else:
                yield judged

    def _drawing(self, writer: PictureWriter) -> Iterator[tuple[Candidates, int, Future[_Drawn]]]:
        """Every candidate that is to be made, begun."""
        for asked in self._rows():
            numbers = writer.missing(asked)
            if not numbers:
                self._complete(asked, writer)
                continue
            row = Candidates(asked, numbers)
            for number in numbers:
                if row.has_failed:
                    break
                yield row, number, self._draw(asked, number)

    def _encoding(
        self, writer: PictureWriter
    ) -> Iterator[tuple[Candidates, int, float | None, Future[dict[int, bytes]] | None]]:
        """Every candidate that was drawn, its score, and it encoded where it is wanted."""
        for row, number, drawing in ahead(self._drawing(writer), self._tools.window):
            if row.has_failed:
                continue
            try:
                drawn = self._settled(row.asked, number, drawing)
            except (EngineStoppedError, EngineFullError):
                raise  # not for anything that was asked of it
            except Exception as error:
                self._fail(row, number, error)
                continue
            self._on_picture()
            is_wanted = row.wants(number, drawn.score)
            encode = partial(_encoded, self._tools, row.asked, number, drawn)
            yield row, number, drawn.score, self._tools.encoders.submit(encode) if is_wanted else None

    def _fail(self, row: Candidates, number: int, error: Exception) -> None:
        seed = row.asked.seeds[number]
        _log.warning("row %d, seed %d: failed twice: %s", row.asked.row, seed, error)
        row.fail()
        detail = f"seed {seed}: {type(error).__name__}: {error}"[:1000]
        self.refused.append(Refused(row.asked.row, row.asked.prompt_id, row.asked.prompt, "failed", detail))

    # --- one picture --------------------------------------------------------------------------------------------------

    def _draw(self, asked: Asked, number: int) -> Future[_Drawn]:
        """Drawn by the engine, then scored."""
        drawn: Future[_Drawn] = Future()
        try:
            ticket = self._tools.feeder.submit(_request(asked, number))
        except (ConfigError, ValueError) as error:
            drawn.set_exception(error)
            return drawn
        with self._lock:
            self._tickets.add(ticket)
        ticket.add_done_callback(lambda _: self._score(asked, ticket, drawn))
        return drawn

    def _score(self, asked: Asked, ticket: Ticket, drawn: Future[_Drawn]) -> None:
        with self._lock:
            self._tickets.discard(ticket)
        if ticket.cancelled():
            drawn.cancel()
        elif (error := ticket.exception()) is not None:
            drawn.set_exception(error)
        elif self._tools.scorer is None:
            drawn.set_result(_Drawn(ticket.result().images, None))
        else:
            picture = _Drawn(ticket.result().images, None)
            scoring = self._tools.scorer.score(asked.prompt, picture.largest)
            scoring.add_done_callback(partial(_scored, picture.images, drawn))

    def _settled(self, asked: Asked, number: int, drawing: Future[_Drawn]) -> _Drawn:
        """What was drawn; where that failed, perhaps for another's sake, it is tried once more without others."""
        try:
            return drawing.result()
        except (EngineStoppedError, EngineFullError):
            raise
        except Exception as error:
            _log.warning("row %d, seed %d: trying once more after: %s", asked.row, asked.seeds[number], error)
        drawn = _Drawn(self._tools.feeder.alone(_request(asked, number)).images, None)
        if self._tools.scorer is None:
            return drawn
        return _Drawn(drawn.images, self._tools.scorer.score(asked.prompt, drawn.largest).result())


def _request(asked: Asked, number: int) -> Request:
    return Request(prompt=asked.prompt, seed=asked.seeds[number], options=asked.options)


def _scored(images: Mapping[int, Picture], drawn: Future[_Drawn], scoring: Future[float]) -> None:
    error = scoring.exception()
    if error is None:
        drawn.set_result(_Drawn(images, scoring.result()))
    else:
        drawn.set_exception(error)


def _encoded(tools: Tools, asked: Asked, number: int, drawn: _Drawn) -> dict[int, bytes]:
    """By side in pixels: every size in format folder, the largest in shards."""
    config = tools.config
    if config.format == "folder":
        metadata = png_metadata(asked, number, tools.bundle)
        if drawn.score is not None:
            metadata["clip_score"] = f"{drawn.score:.6f}"
        return {side: encode_png(image, metadata) for side, image in drawn.images.items()}
    return {max(drawn.images): encode(drawn.largest, config.encoding, config.quality)}


def encode(picture: Picture, encoding: str, quality: int) -> bytes:
    """uint8 (S, S, 3) as png, jpeg or webp; `quality` (1 to 100) is of the latter two."""
    if encoding == "png":
        return encode_png(picture, {})
    buffer = io.BytesIO()
    how = {"subsampling": 0} if encoding == "jpeg" else {}  # whole colours, whose edges show in drawings
    Image.fromarray(picture).save(buffer, format=encoding, quality=quality, **how)
    return buffer.getvalue()
