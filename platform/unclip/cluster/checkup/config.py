"""What a checkup is asked for."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from unclip.config.base import Config
from unclip.pipelines.stages import StageName

CheckName = Literal[
    "nodes",
    "versions",
    "clock",
    "ports",
    "shared_memory",
    "spill",
    "scratch",
    "open_files",
    "gpus",
    "storage",
    "room",
    "all_reduce",
    "training",
]
CHECKS: tuple[CheckName, ...] = get_args(CheckName)
"""In the order in which they run: what others build on comes first."""


class CheckupConfig(Config):
    """Which cluster is checked, for what."""

    storage: str = ""
    """Folder or s3:// address that the runs will use; required. What is written there is deleted again."""
    checks: tuple[CheckName, ...] = CHECKS
    """The checks to run: nodes, versions, clock, ports, shared_memory, spill, scratch, open_files, gpus, storage, room,
    all_reduce, training."""
    stage: StageName | None = None
    """Stage of the run that shall fit; none: room is not checked."""
    recipe: str = "paper"
    """Recipe of that stage."""
    settings: tuple[str, ...] = ()
    """Changes to that recipe, as its --set takes them: [resources.num_workers=16, resources.data_cpus=32]."""
    gpus: int = Field(default=0, ge=0)
    """GPUs that the cluster shall have, where no stage is given; an autoscaler is asked for what is missing, of these or of
    what the stage's recipe needs."""
    cpus: int = Field(default=0, ge=0)
    """The same of CPUs."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of the nodes that have those GPUs, and on which the trial trains: {unclip/group: train}; with a
    stage, resources.node_labels of its settings say so."""
    wait_s: float = Field(default=900.0, ge=0)
    """Longest wait for nodes that were asked for."""
    limit_s: float = Field(default=120.0, gt=0)
    """Longest wait for a node's answer to one check; a node that is silent for longer has failed it."""
    training_limit_s: float = Field(default=900.0, gt=0)
    """Longest time for the trial training."""
    transfer_mb: int = Field(default=64, ge=1)
    """MB that each node writes to the storage and reads back; also to the folders for spilled objects and scratch."""
    requirements: str = ""
    """File of pinned versions that all nodes shall have; empty: the one beside jobs/, where there is one."""
    report: str = ""
    """JSON file, local or s3://, for everything that was found; empty: none."""
