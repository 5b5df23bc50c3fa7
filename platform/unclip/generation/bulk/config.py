"""What a generation job is asked for."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.config.cost import CostConfig
from unclip.generation.engine.config import EngineConfig
from unclip.pipelines.cascade import GenerationOptions

OutputFormat = Literal["folder", "parquet", "webdataset"]
Encoding = Literal["png", "jpeg", "webp"]

PICTURES_PER_PROMPT = 10_000
"""Most pictures of a prompt, kept or not: their numbers are the last four digits of a picture's id."""
OPTION_COLUMNS = ("id", "seed", "n", "guidance_scale", "num_inference_steps", "size")
"""Columns of a list of prompts that say something about how a row's pictures are made."""

_CONTENT = ("format", "encoding", "quality", "seed", "n", "best_of", "options", "precision", "prompts_per_shard")


class GenerateConfig(Config):
    """Pictures of one prompt or of a list of any length, made by the stages of one bundle."""

    bundle: str = ""
    """Folder or s3:// address of the trained bundle; required."""
    prompt: str | None = None
    """The one prompt; give this or prompts."""
    prompts: str | None = None
    """Local or s3:// address of a list of prompts (.parquet, .csv, .tsv, .jsonl, or .txt with one a line), or of a folder
    of such files."""
    prompt_column: str = Field("prompt", min_length=1)
    """Column of the prompts. The columns id, seed, n, guidance_scale, num_inference_steps (both the decoder's) and size
    say what a row wants otherwise than the job; all further ones are carried along."""
    out: str = ""
    """Folder or s3:// address of the pictures; required. The same job run again makes what is missing."""
    format: OutputFormat = "folder"
    """folder: a PNG of every size for each picture; parquet, webdataset: shards of the largest pictures."""
    encoding: Encoding = "png"
    """How pictures in shards are encoded."""
    quality: int = Field(95, ge=1, le=100)
    """Of jpeg and webp."""
    seed: int = Field(0, ge=0, le=2**62)
    """Seed of each prompt's first picture; its further pictures count up from there."""
    n: int = Field(1, ge=1, le=PICTURES_PER_PROMPT)
    """Pictures of each prompt, each with a seed of its own."""
    best_of: int | None = Field(None, ge=1, le=PICTURES_PER_PROMPT)
    """Makes so many pictures of each prompt and keeps the n that CLIP finds most like it; null keeps all that are made."""
    options: GenerationOptions = GenerationOptions()
    """How each stage samples, and the largest size that any row may have."""
    engine: EngineConfig = EngineConfig()
    """Bounds of each actor's engine; they change speed and memory, not the pictures."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda)$")
    """Where the networks run; auto takes a CUDA device where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; the sampler itself always runs in fp32."""
    prompts_per_shard: int = Field(256, ge=1, le=65_536)
    """Prompts that are made, and after an interruption made again, together; their pictures are one shard."""
    actors: int | None = Field(None, ge=1)
    """Processes that make pictures at the same time; null for one a GPU of the cluster, or one where there are none. Where an
    autoscaler brings the nodes, it is asked for as many as are given here."""
    gpus_per_actor: float | None = Field(None, ge=0)
    """GPUs, or a share of one, that each of them claims; null for one where the cluster has any and device allows it."""
    cpus_per_actor: float = Field(1.0, gt=0)
    """CPUs that each of them claims."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of the nodes that they may use: `{unclip/group: train}`; empty: all nodes."""
    cost: CostConfig = CostConfig()
    """What their hours are counted at."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of = {self.best_of} is less than n = {self.n}, which are to be kept of them")
        if self.format == "folder" and self.encoding != "png":
            raise ValueError(f"encoding = {self.encoding!r}: format folder writes png; shards can hold the others")
        gpus = self.gpus_per_actor
        if gpus is not None and gpus > 1 and not gpus.is_integer():
            raise ValueError(f"gpus_per_actor = {gpus}: a share of one GPU, or whole ones")
        if self.prompt_column in OPTION_COLUMNS:
            raise ValueError(f"prompt_column = {self.prompt_column!r}: that column means something else already")
        return self

    @property
    def candidates(self) -> int:
        """Pictures that are made of a prompt whose row does not say otherwise."""
        return self.best_of or self.n

    @property
    def content(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change what comes out, beside bundle and prompts."""
        fields = self.to_dict()
        content = {name: fields[name] for name in _CONTENT}
        content["options"].pop("max_pixels")  # a bound on memory
        return content
