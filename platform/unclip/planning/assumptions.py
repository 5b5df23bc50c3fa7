"""What a plan takes for granted: every figure that is neither counted nor on a data sheet, with its default."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unclip.config.base import Config
from unclip.pipelines.stages import StageName
from unclip.training.engine import Precision
from unclip.training.offload import Offload

GpuName = Literal["b200", "h200", "h100", "a100-80", "a100-40", "l40s", "a10g", "v100", "t4"]


class PlanConfig(Config):
    """A run, the GPUs it would have, and what is assumed of them."""

    recipe: str = "paper"
    """Recipe of the stage."""
    stage: StageName
    """What would be trained."""
    gpu: GpuName = "h100"
    """Kind of GPU."""
    gpus: int = Field(gt=0)
    """How many of them: a worker each."""
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage; none: the recipe's."""
    precision: Precision | None = None
    """Float types as zero.precision; none: the recipe's."""
    offload_optimizer: Offload = "none"
    """Where the updated weights, moments and averages lie."""
    offload_parameters: Offload = "none"
    """Where sharded weights lie between their uses."""
    microbatch: int | None = Field(default=None, gt=0)
    """Samples of a micro-batch; none: as many as fit."""
    global_batch: int | None = Field(default=None, gt=0)
    """Samples of an optimizer step; none: the recipe's."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps of the run; none: the recipe's."""
    activation_checkpointing: bool | None = None
    """Whether activations are computed again; none: as the recipe says."""
    margin: float = Field(default=0.1, ge=0, lt=1)
    """Share of a GPU's memory that is left free: fragments, workspaces of kernels."""
    utilization: float = Field(default=0.45, gt=0, le=1)
    """Share of the peak FLOP/s that a GPU reaches while it computes, recomputation included."""
    link_efficiency: float = Field(default=0.8, gt=0, le=1)
    """Share of the links' rate that collectives reach."""
    overlap: float = Field(default=0.5, ge=0, le=1)
    """Share of the computing time behind which stage 3 hides communication; the other stages hide none."""
    node_link: float | None = Field(default=None, gt=0)
    """GB/s of a GPU to the others of its node; none: the data sheet's."""
    cluster_link: float | None = Field(default=None, gt=0)
    """GB/s of a GPU to other nodes; none: those of a usual node."""
    host_link: float = Field(default=25.0, gt=0)
    """GB/s of a GPU to host memory, for what is offloaded."""
    host_memory: float = Field(default=20.0, gt=0)
    """GB/s at which the host updates a worker's offloaded state."""
    disk: float = Field(default=3.0, gt=0)
    """GB/s of a worker's share of its node's disks, for what is offloaded to them."""
    price: float | None = Field(default=None, gt=0)
    """US dollars for an hour of a GPU; none: a guess of 2025."""
    record_kb: float = Field(default=50.0, gt=0)
    """kB of a record in the data set, picture and caption."""
    core_images: float = Field(default=750.0, gt=0)
    """Records a second that a CPU core reads, decodes and hands on (docs/data.md: 750 crops of 256 px, 950 whole pictures
    of 64 px)."""
    node_cores: int = Field(default=64, gt=0)
    """Cores of a CPU node of the data stream."""
    curve: str = ""
    """PNG to draw the scaling curve to, local or `s3://`; none: no picture."""
    output: Literal["tables", "json"] = "tables"
    """What is printed: tables for people or JSON."""
