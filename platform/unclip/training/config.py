"""`TrainConfig`: everything that one training run is, as recipes build it and run folders store it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.config.cost import CostConfig
from unclip.config.resources import ResourcesConfig
from unclip.pipelines.stages import StageName
from unclip.training.engine import ZeroConfig
from unclip.training.objectives import ObjectiveConfig
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.optim import OptimizerConfig
from unclip.training.reporting.config import ReportingConfig
from unclip.training.validation.config import ValidationConfig


class DataSourceConfig(Config):
    """One of the folders that a run's batches are mixed of."""

    path: str = Field(min_length=1)
    """Folder of Parquet shards, local or `s3://`; columns as in the record contract."""
    weight: float = Field(default=1.0, gt=0)
    """Samples of it in a batch, in proportion to the other sources' weights."""


class TrainDataConfig(Config):
    """Where the records come from and how they are shuffled."""

    path: str
    """Folder of Parquet shards, local or `s3://`; columns as in the record contract."""
    weight: float = Field(default=1.0, gt=0)
    """Samples of it in a batch, in proportion to the weights of `others`."""
    others: tuple[DataSourceConfig, ...] = ()
    """Further folders whose records are mixed with those of `path` in every batch: `[{path: …, weight: 1}]` is half
    and half (the paper's mix of two data sets)."""
    shuffle_rows: int = Field(default=16384, gt=0)
    """Rows mixed with each other in one chunk; chunks draw from row groups permuted over the whole data set."""
    embeddings: Literal["columns", "stream"] = "columns"
    """CLIP embeddings: `columns` written by jobs/embed.py, or made in the `stream` by a pool of frozen CLIPs."""

    @property
    def paths(self) -> dict[str, str]:
        """The folder of each source by the name of its field, in their order."""
        return {"data.path": self.path} | {f"data.others.{i}.path": other.path for i, other in enumerate(self.others)}

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each source, in the order of `paths`."""
        return (self.weight, *(other.weight for other in self.others))


class LoopConfig(Config):
    """How long, how much at once, and how often to save and report."""

    max_steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(gt=0)
    """Samples of one optimizer step over all workers; the micro-batches follow from it."""
    microbatch_size: int = Field(gt=0)
    """Samples that one worker puts through the model at once, at most; what is left of its share is accumulated."""
    time_limit_s: float | None = Field(default=None, gt=0)
    """Seconds of training, restarts not counted twice, after which the run ends as if max_steps were reached."""
    log_every: int = Field(default=10, gt=0)
    """Steps between two lines of metrics."""
    checkpoint_every_s: float = Field(default=600.0, ge=0)
    """Seconds between two checkpoints: the most work that a killed worker can lose. 0 saves after every step."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints that are kept."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Checkpoints of these steps and their multiples are kept for good; none: only the newest."""
    max_skipped_steps: int = Field(default=10, gt=0)
    """Steps in a row without a finite gradient, which change nothing, after which the run ends with an error."""
    stall_limit_s: float = Field(default=1800.0, gt=0)
    """Longest time that a worker may wait for one thing (a batch, the other workers, a checkpoint) before it says what it
    waits for and ends."""


class TrainConfig(Config):
    """One training run of one stage."""

    stage: StageName
    """What is trained, and its name in the bundle."""
    recipe: str
    """Name of the recipe that this configuration came from."""
    seed: int = Field(default=0, ge=0)
    """Seeds the initial weights, the order of samples, crops, degradations, noise and drops."""
    run: str
    """Run folder, local or `s3://`: configuration, metrics and checkpoints. The same command continues a run."""
    resume: Literal["auto", "require", "refuse"] = "auto"
    """Going on with what the run folder holds: auto, where it holds a checkpoint; require or refuse that it does."""
    init_from: str | None = None
    """Weights that a new run begins with: a run folder, one of its checkpoints, or a stage of a bundle. Optimizer, step and
    data begin anew; a run that is resumed ignores it."""
    bundle: str | None = None
    """Bundle that receives the trained stage (EMA weights) at the end; none: no export."""
    clip: str | None = None
    """CLIP of this stage: an open_clip name, `hf-hub:…`, or the folder of an exported `clip` stage.
    Needed where embeddings are made in the stream; else taken from the embedded data set."""
    clip_fingerprint: str | None = None
    """Identity of that CLIP; filled in when the run is prepared, so that a run cannot go on with another one."""
    data_identity: tuple[str, ...] = ()
    """Hashes of each source's records; filled in when the run is prepared, so that a run cannot go on with others."""
    data: TrainDataConfig
    objective: ObjectiveConfig = Field(discriminator="kind")
    optimizer: OptimizerConfig
    zero: ZeroConfig
    loop: LoopConfig
    resources: ResourcesConfig = ResourcesConfig()
    validation: ValidationConfig = ValidationConfig()
    reporting: ReportingConfig = ReportingConfig()
    cost: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        workers, batch = self.resources.num_workers, self.loop.global_batch_size
        if not self._can_be_shared(workers):
            raise ValueError(
                f"loop.global_batch_size = {batch} must be a multiple of resources.num_workers = {workers}, and each "
                f"worker's share of loop.microbatch_size = {self.loop.microbatch_size} unless it is smaller"
            )
        if self.objective.stage_config().kind != self.stage:
            raise ValueError(f"objective trains {self.objective.stage_config().kind!r}, but stage = {self.stage!r}")
        if self.zero.stage == 3 and isinstance(self.objective, ClipObjectiveConfig) and self.objective.sam_rho:
            raise ValueError("objective.sam_rho needs whole weights on each worker: zero.stage must be below 3")
        if self.data.embeddings == "stream" and self.objective.embedding_columns and self.clip is None:
            raise ValueError("data.embeddings = 'stream' needs a CLIP: set clip to a name or a folder")
        return self

    def for_workers(self, count: int) -> TrainConfig:
        """The same run by another number of workers; `ConfigError` where they cannot share the global batch."""
        return self.merged({"resources": {"num_workers": count}})

    @property
    def worker_counts(self) -> tuple[int, ...]:
        """Numbers of workers that the run may have, most first: those from min_workers to num_workers that can share
        the global batch in whole micro-batches."""
        most = self.resources.num_workers
        return tuple(filter(self._can_be_shared, range(most, (self.resources.min_workers or most) - 1, -1)))

    def _can_be_shared(self, workers: int) -> bool:
        """Whether each of so many workers has the same part of the global batch, in whole micro-batches."""
        share, rest = divmod(self.loop.global_batch_size, workers)
        return rest == 0 and share % min(self.loop.microbatch_size, share) == 0

    @property
    def microbatch_size(self) -> int:
        """Samples that one worker puts through the model at once."""
        return min(self.loop.microbatch_size, self.rank_batch_size)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that one worker accumulates for an optimizer step."""
        return self.rank_batch_size // self.microbatch_size

    @property
    def rank_batch_size(self) -> int:
        """Samples that one worker sees in an optimizer step."""
        return self.loop.global_batch_size // self.resources.num_workers
