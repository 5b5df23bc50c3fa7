"""What a generation job was asked for, and the list of pictures that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.models.clip import Tokenizer
from unclip.models.text import caption_mask
from unclip.pipelines.cascade import Cascade, GenerationOptions
from unclip.pipelines.guides import check_label
from unclip.utils import storage

MAX_PROMPT_CHARACTERS = 2000
"""Far beyond any context length; a longer line is a file that holds something else than prompts."""


class GenerateConfig(Config):
    """A folder of pictures made from one prompt or a file of prompts by the stages of one bundle."""

    bundle: str = ""
    """Folder or s3:// address of the trained bundle; required."""
    prompt: str | None = None
    """The one prompt; give this or prompts_file."""
    prompts_file: str | None = None
    """Path or s3:// address of a UTF-8 text file with one prompt a line."""
    out: str = ""
    """Folder or s3:// address for the pictures and grid.png; required. Pictures finished before are kept."""
    seed: int = Field(0, ge=0, le=2**62)
    """Seed of each prompt's first picture; its further pictures count up from there."""
    images_per_prompt: int = Field(1, ge=1, le=10_000)
    """Pictures of each prompt, each with a seed of its own."""
    batch_size: int = Field(8, ge=1)
    """Pictures made together; it changes speed and memory, not the pictures."""
    options: GenerationOptions = GenerationOptions()
    """How each stage samples, and the largest size that is wanted."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where the networks run; auto takes a CUDA device where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; the sampler itself always runs in fp32."""
    grid_rows: int = Field(16, ge=1, le=200)
    """Pictures in grid.png, one a row, the first ones asked for."""


@dataclass(frozen=True)
class Request:
    """One picture to make: the prompt's number in the file, from 0, its text, and the picture's seed."""

    index: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """The picture's file name, the same on every run."""
        return f"{self.index:05d}-{self.seed}.png"


def plan(config: GenerateConfig) -> list[Request]:
    """Every picture of the job in order.

    Raises `ConfigError` where a required field is not given, both or neither of prompt and prompts_file are, the file
    cannot be read, or a prompt is empty or too long (naming its line).
    """
    for name in ("bundle", "out"):
        if not getattr(config, name):
            raise ConfigError(f"{name}: required, but not given")
    seeds = range(config.seed, config.seed + config.images_per_prompt)
    return [Request(index, prompt, seed) for index, prompt in enumerate(_prompts(config)) for seed in seeds]


def _prompts(config: GenerateConfig) -> list[str]:
    if config.prompt is not None and config.prompts_file is not None:
        raise ConfigError(f"prompt = {config.prompt!r} and prompts_file = {config.prompts_file!r}: give one, not both")
    if config.prompts_file is not None:
        return _read_prompts(config.prompts_file)
    if config.prompt is None:
        raise ConfigError("prompt, prompts_file: neither is given; give one of them")
    return [_checked(config.prompt, "prompt")]


def _read_prompts(uri: str) -> list[str]:
    try:
        content = storage.read_bytes(uri)
    except OSError as error:
        raise ConfigError(f"prompts_file = {uri!r}: cannot be read: {error.strerror or error}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"prompts_file = {uri!r}, line {line}: not UTF-8 text") from None
    if not text.strip():
        raise ConfigError(f"prompts_file = {uri!r}: holds no prompts")
    lines = text.removesuffix("\n").split("\n")
    return [_checked(line, f"prompts_file = {uri!r}, line {number}") for number, line in enumerate(lines, start=1)]


def _checked(prompt: str, where: str) -> str:
    prompt = prompt.strip()
    if not prompt:
        raise ConfigError(f"{where}: the prompt is empty")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ConfigError(
            f"{where}: the prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed"
        )
    if not prompt.isprintable():
        raise ConfigError(f"{where}: the prompt {prompt[:60]!r} has control characters")
    return prompt


def check_prompts(config: GenerateConfig, requests: Sequence[Request], cascade: Cascade) -> None:
    """Raises `ConfigError` naming the first prompt that the networks would see only the beginning of, or that is no class."""
    tokenizer, roomy = Tokenizer(None), MAX_PROMPT_CHARACTERS + 2
    for index, prompt in {request.index: request.prompt for request in requests}.items():
        where = "prompt" if config.prompts_file is None else f"prompts_file = {config.prompts_file!r}, line {index + 1}"
        if cascade.classes:
            check_label(where, prompt, cascade.classes)
        tokens = torch.from_numpy(tokenizer([prompt], roomy))
        count = int(caption_mask(tokens).sum())
        if count > cascade.context_length:
            raise ConfigError(
                f"{where}: the prompt has {count} tokens with start and end; the networks read {cascade.context_length}"
            )
