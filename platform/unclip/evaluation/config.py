"""What an evaluation is asked for."""

from __future__ import annotations

from pydantic import Field

from unclip.config.base import Config


class EvaluateConfig(Config):
    """Which pictures to judge, against which others, and by whose features."""

    pictures: str = ""
    """Pictures to judge: a folder of jobs/generate.py in format parquet or webdataset, or of records; required."""
    reference: str | None = None
    """Pictures they should be like: records, or OUT/features/reference of an earlier evaluation; null leaves out every
    metric that compares two sets."""
    clip: str = ""
    """CLIP whose features are compared, and which scores captions: an open_clip name, `hf-hub:…`, or a folder; required."""
    inception: str | None = None
    """safetensors file with the weights of FID's Inception network; null leaves its metrics out."""
    out: str = ""
    """Folder for features and results; required. The same job run again makes what is missing."""
    limit: int | None = Field(default=None, ge=1)
    """Pictures of each set that are judged at most, chosen at random with `seed`; null for all."""
    seed: int = Field(default=0, ge=0)
    """Chooses what `limit` leaves, the subsets of KID, and the resamples of confidence intervals."""
    neighbours: int = Field(default=3, ge=1)
    """Precision and recall: the neighbour that a picture's sphere reaches to."""
    kid_subsets: int = Field(default=100, ge=1)
    """KID: pairs of random subsets that it is averaged over."""
    kid_subset_size: int = Field(default=1000, ge=2)
    """KID: pictures of each subset; of smaller sets as many as there are."""
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples of the captions, for the confidence interval of CLIP-score."""
    show: int = Field(default=12, ge=0)
    """Pictures of highest and of lowest CLIP-score on the page."""
    actors: int = Field(default=1, ge=1)
    """Processes that make features at once, each with all networks."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each; 0 runs them on one CPU."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of the nodes whose GPUs they may take: `{unclip/group: train}`; empty: all nodes."""
    microbatch: int = Field(default=64, ge=1)
    """Pictures that pass a network at once; another number may change features in the last bit."""
    data_cpus: int = Field(default=1, ge=1)
    """Tasks that decode at once, and that write; at the end, CPUs of the task that computes the metrics."""
