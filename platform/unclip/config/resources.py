"""What a training run asks of the machine or cluster it runs on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from unclip.config.base import Config


class ResourcesConfig(Config):
    """Workers, and the CPUs and GPUs that they, the data stream and a CLIP in the stream may use.

    CPUs are logical ones, as Ray counts them.
    """

    num_workers: int = Field(default=1, ge=1)
    """Training workers: one process each, together one data-parallel group."""
    min_workers: int | None = Field(default=None, ge=1)
    """Fewest workers that the run goes on with when nodes are lost; it grows again, up to num_workers, when they are back.
    Of the numbers between, those count that share the global batch in whole micro-batches. None: always num_workers."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """Train on GPUs; auto: where the cluster has enough of them for every worker."""
    gpus_per_worker: float = Field(default=1.0, gt=0)
    """GPUs of a worker that trains on them; less than 1 shares one."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs reserved for a worker."""
    threads_per_worker: int = Field(default=0, ge=0)
    """Threads of a worker's tensor operations; 0 shares a node's cores evenly among its workers."""
    data_cpus: int = Field(default=1, ge=1)
    """CPUs of the data stream: so many processes decode at once, beside the workers."""
    clip_actors: int = Field(default=1, ge=1)
    """Frozen CLIPs that work at once where embeddings are made in the stream."""
    clip_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each of them; 0 runs them on one CPU each."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How workers are placed on nodes: together where possible (PACK), apart where possible (SPREAD), or strictly so."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of the nodes that workers, and what else takes GPUs, may use: `{unclip/group: train}`; empty: all nodes."""
    max_failures: int = Field(default=3, ge=0)
    """Failures in a row, without a newer checkpoint between them, after which the run goes on all the same: workers that died,
    a store that did not answer. Nodes that gave notice (preemption, drain) and changes of the number of workers do not
    count."""
    wait_s: float = Field(default=1800.0, ge=0)
    """Longest wait for room for the workers, at the start and after each loss, before the run ends with an error that says
    what is missing."""

    @model_validator(mode="after")
    def _fewest(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers = {self.min_workers} is above num_workers = {self.num_workers}")
        return self

    @model_validator(mode="after")
    def _one_gpu_each(self) -> Self:
        if self.gpus_per_worker < 1 and self.num_workers > 1:
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker} with num_workers = {self.num_workers}: "
                "NCCL refuses workers that share a GPU"
            )
        return self
