"""What a row of a list asks for, judged before anything is made of it; no weights are needed."""

from __future__ import annotations

import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

import torch

from unclip.config.base import ConfigError
from unclip.data.sources.base import is_utf8, printable
from unclip.data.sources.lists import Record
from unclip.generation.bulk.config import OPTION_COLUMNS, PICTURES_PER_PROMPT, GenerateConfig
from unclip.models.clip import Tokenizer
from unclip.models.text import caption_mask
from unclip.pipelines.cascade import Cascade, GenerationOptions, plan_cascade
from unclip.pipelines.guides import check_label
from unclip.pipelines.stages import StageConfig, StageName

MAX_PROMPT_CHARACTERS = 2000
"""Far beyond any context length; a longer prompt is something else."""
MAX_ID_CHARACTERS = 1000
MAX_FIELDS_CHARACTERS = 65_536
"""Of the JSON text of what a row carries along: a unit of such rows stays far below what its pictures take."""

Reason = Literal["bad_record", "empty", "too_long", "bad_prompt", "bad_parameters", "failed"]
"""Why a row has no pictures:

bad_record      no row at all: broken JSON, another number of fields than the table has; or too much is carried along
empty           there is no prompt, or nothing but spaces
too_long        more characters or tokens than the networks read
bad_prompt      no text, or text with control characters; or none of the decoder's classes
bad_parameters  a column of options holds what the bundle cannot do
failed          twice an error came up while its pictures were made
"""

_MOST = 1e9
_NUMBER_CHARACTERS = 64
_WHOLE = re.compile(r"([+-]?\d{1,30})(\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,4})?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """What a row wants.

    Args:
        row: its number among those of all lists.
        prompt_id: the caller's own id.
        n: pictures to keep.
        seeds: of the pictures to make; a picture's number is its seed's place in them.
        options: how they are made; `parameters` is all that changes them beside bundle, prompt and seed, as JSON text.
        fields: what the row carries along, as JSON text.
    """

    row: int
    prompt_id: str | None
    prompt: str
    n: int
    seeds: range
    options: GenerationOptions
    parameters: str
    fields: str

    def picture_id(self, number: int) -> int:
        """The same on every run and every cluster; fits into 63 bits."""
        return self.row * PICTURES_PER_PROMPT + number


@dataclass(frozen=True)
class Refused:
    """A row that has no pictures, and why; as much of id and prompt as can be shown."""

    row: int
    prompt_id: str | None
    prompt: str | None
    reason: Reason
    detail: str


class _Refusal(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason
        self.detail = detail


class Judge:
    """Tells rows that can be done from those that cannot.

    Raises `ConfigError` or `BundleError` where the job's own options do not suit the bundle's stages.

    Args:
        configs: of the bundle's stages.
    """

    def __init__(self, config: GenerateConfig, configs: Mapping[StageName, StageConfig]) -> None:
        self._config, self._configs = config, configs
        self._sizes = tuple(plan_cascade(configs, config.options).sizes.values())
        self._planned = lru_cache(maxsize=1024)(self._plan)  # most rows want what others wanted
        self._tokenizer = Tokenizer(None)

    def judge(self, row: int, record: Record, *, is_text: bool = False) -> Asked | Refused:
        """What row number `row` asks for.

        Args:
            is_text: values are texts, and numbers are read from them; otherwise a text is no number.
        """
        values = record.values
        prompt = values.get(self._config.prompt_column)
        prompt_id: str | None = None
        try:
            if record.problem is not None:
                raise _Refusal("bad_record", record.problem)
            prompt_id = _prompt_id(_given(values, "id"))
            fields = _carried(values, {self._config.prompt_column, *OPTION_COLUMNS})
            return self._asked(row, prompt_id, prompt, fields, _Options(values, is_text))
        except _Refusal as refusal:
            shown = printable(prompt[:MAX_PROMPT_CHARACTERS]) if isinstance(prompt, str) else None
            return Refused(row, prompt_id, shown, refusal.reason, printable(refusal.detail[:1000]))

    def _asked(self, row: int, prompt_id: str | None, prompt: Any, fields: str, wanted: _Options) -> Asked:
        text = _prompt(prompt)
        seed = wanted.whole("seed", 0, 2**62)
        n = wanted.whole("n", 1, self._config.best_of or PICTURES_PER_PROMPT)
        guidance_scale = wanted.number("guidance_scale")
        steps, size = wanted.whole("num_inference_steps", 1, 2**31), wanted.whole("size", 1, 2**31)
        try:
            cascade, options, parameters = self._planned(guidance_scale, steps, size)
        except ConfigError as error:
            raise _Refusal("bad_parameters", str(error)) from None
        self._check_prompt(text, cascade)
        n = self._config.n if n is None else n
        first = self._config.seed if seed is None else seed
        seeds = range(first, first + (self._config.best_of or n))
        return Asked(row, prompt_id, text, n, seeds, options, parameters, fields)

    def _plan(
        self, guidance_scale: float | None, steps: int | None, size: int | None
    ) -> tuple[Cascade, GenerationOptions, str]:
        """What the job's options become with those of a row, and that as JSON text."""
        decoder: dict[str, Any] = {}
        if guidance_scale is not None:
            decoder["guidance_scale"] = guidance_scale
        if steps is not None:
            decoder |= {"num_inference_steps": steps, "timesteps_list": None}  # which would say another number
        if size is not None and size not in self._sizes:
            raise ConfigError(f"size = {size}: this job makes {', '.join(map(str, self._sizes))} pixels")
        changes = {"decoder": decoder} | ({} if size is None else {"up_to": size})
        options = self._config.options.merged(changes)
        cascade = plan_cascade(self._configs, options)
        settings = {"precision": self._config.precision, **cascade.settings}
        return cascade, options, json.dumps(settings, sort_keys=True)

    def _check_prompt(self, prompt: str, cascade: Cascade) -> None:
        if cascade.classes:
            try:
                check_label("prompt", prompt, cascade.classes)
            except ConfigError as error:
                raise _Refusal("bad_prompt", str(error)) from None
        tokens = torch.from_numpy(self._tokenizer([prompt], MAX_PROMPT_CHARACTERS + 2))
        count = int(caption_mask(tokens).sum())
        if count > cascade.context_length:
            detail = f"the prompt has {count} tokens with start and end; the networks read {cascade.context_length}"
            raise _Refusal("too_long", detail)


class _Options:
    """The columns of options of a row; None where a cell is empty."""

    def __init__(self, values: Mapping[str, Any], is_text: bool) -> None:
        self._values, self._is_text = values, is_text

    def whole(self, name: str, least: int, most: int) -> int | None:
        """A whole number; 3.0 is one, for tables that have no empty cells among whole numbers hold such."""
        value = _given(self._values, name)
        if value is None:
            return None
        if self._is_text and (match := _WHOLE.fullmatch(_short(value))):
            value = int(match[1])
        if not _is_number(value) or value != int(value):
            raise _Refusal("bad_parameters", f"{name} = {reprlib.repr(value)}: must be a whole number")
        if not least <= value <= most:
            raise _Refusal("bad_parameters", f"{name} = {reprlib.repr(value)}: must be from {least} to {most}")
        return int(value)

    def number(self, name: str) -> float | None:
        """A number from 0 to _MOST."""
        value = _given(self._values, name)
        if value is None:
            return None
        if self._is_text and _NUMBER.fullmatch(_short(value)):
            value = float(value)
        if not _is_number(value) or not 0 <= value <= _MOST:
            raise _Refusal("bad_parameters", f"{name} = {reprlib.repr(value)}: must be a number from 0 to {_MOST:g}")
        return float(value)


def _short(value: Any) -> str:
    """A text that may be a number; the rest is not worth a look."""
    return value.strip() if isinstance(value, str) and len(value) <= _NUMBER_CHARACTERS else ""


def _is_number(value: Any) -> bool:
    if isinstance(value, float | Decimal):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _given(values: Mapping[str, Any], name: str) -> Any:
    value = values.get(name)
    return None if isinstance(value, str) and not value.strip() else value


def _prompt_id(value: Any) -> str | None:
    """The caller's id as text."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as tables hold them that have empty cells
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Refusal("bad_parameters", f"id = {reprlib.repr(value)}: must be a text or a whole number")
    if isinstance(value, int) and abs(value) >= 2**128:
        raise _Refusal("bad_parameters", "id: a number of more than 128 bits")
    text = str(value)
    if len(text) > MAX_ID_CHARACTERS:
        raise _Refusal("bad_parameters", f"id has {len(text)} characters; at most {MAX_ID_CHARACTERS} are allowed")
    if not is_utf8(text):
        raise _Refusal("bad_parameters", f"id = {reprlib.repr(value)}: is not UTF-8")
    return text


def _prompt(value: Any) -> str:
    if value is None:
        raise _Refusal("empty", "there is no prompt")
    if not isinstance(value, str):
        raise _Refusal("bad_prompt", f"the prompt is no text, but {type(value).__name__}")
    text = value.strip()
    if not text:
        raise _Refusal("empty", "the prompt is empty")
    if len(text) > MAX_PROMPT_CHARACTERS:
        detail = f"the prompt has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed"
        raise _Refusal("too_long", detail)
    if not is_utf8(text):
        raise _Refusal("bad_prompt", f"the prompt {text[:60]!r} is not UTF-8")
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise _Refusal("bad_prompt", f"the prompt {text[:60]!r} has control characters")
    return text


def _carried(values: Mapping[str, Any], known: set[str]) -> str:
    """The rest of a row as JSON text that every reader takes."""
    rest = {name: value for name, value in values.items() if name not in known}
    try:
        text = json.dumps(_plain(rest), separators=(",", ":"))
    except (RecursionError, ValueError) as error:
        raise _Refusal("bad_record", f"its further columns cannot be carried along: {error}") from None
    if len(text) > MAX_FIELDS_CHARACTERS:
        detail = f"its further columns have {len(text)} characters; at most {MAX_FIELDS_CHARACTERS} are carried along"
        raise _Refusal("bad_record", detail)
    return text


def _plain(value: Any) -> Any:
    """As JSON has it: what it has no form for is text; bytes, infinite numbers and those that are none are null."""
    if isinstance(value, Mapping):
        return {printable(str(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if value is None or isinstance(value, int | float) else printable(str(value))
