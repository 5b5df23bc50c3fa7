"""What an evaluation is asked for: of pictures, of a prior, or of an upsampler."""

from __future__ import annotations

from pydantic import Field

from unclip.config.base import Config
from unclip.pipelines.cascade import UpsamplerName
from unclip.pipelines.options import PriorOptions, SamplerOptions


class EvaluateConfig(Config):
    """What every evaluation is asked for: where it goes, how many records it judges, and who does the work."""

    out: str = ""
    """Folder for features and results; required. The same job run again makes what is missing."""
    limit: int | None = Field(default=None, ge=1)
    """Records of each set that are judged at most, chosen at random with `seed`; null for all."""
    seed: int = Field(default=0, ge=0)
    """Chooses what `limit` leaves, the noise of samples, random subsets, and the resamples of confidence intervals."""
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples, for confidence intervals."""
    show: int = Field(default=12, ge=0)
    """Records on the page; of pictures so many of highest and of lowest CLIP-score."""
    actors: int = Field(default=1, ge=1)
    """Processes that run networks at once, each with all of them."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs of each; 0 runs them on one CPU."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Ray labels of the nodes whose GPUs they may take: `{unclip/group: train}`; empty: all nodes."""
    microbatch: int = Field(default=64, ge=1)
    """Records that pass a network at once; another number may change features in the last bit."""
    data_cpus: int = Field(default=1, ge=1)
    """Tasks that decode at once, and that write; at the end, CPUs of the task that computes the metrics."""


class EvaluatePicturesConfig(EvaluateConfig):
    """Which pictures to judge, against which others, and by whose features."""

    pictures: str = ""
    """Pictures to judge: a folder of jobs/generate.py in format parquet or webdataset, or of records; required."""
    reference: str | None = None
    """Pictures they should be like: records, or OUT/features/reference of an earlier evaluation; null leaves out every
    metric that compares two sets."""
    clip: str = ""
    """CLIP whose features are compared, and which scores captions: an open_clip name, `hf-hub:…`, or a folder; required."""
    inception: str | None = None
    """safetensors file with the weights of FID's Inception network, an address or `hf-hub:ORG/NAME[@REVISION]/FILE`;
    null leaves its metrics out."""
    judge: str | None = None
    """Folder of jobs/train_judge.py: whether pictures show the attributes that their captions state; null leaves it out."""
    training: str | None = None
    """Records that the generator was trained on, or OUT/features/training of an earlier evaluation: how near pictures come
    to them; `limit` does not apply; null leaves it out."""
    neighbours: int = Field(default=3, ge=1)
    """Precision and recall: the neighbour that a picture's sphere reaches to."""
    kid_subsets: int = Field(default=100, ge=1)
    """KID: pairs of random subsets that it is averaged over."""
    kid_subset_size: int = Field(default=1000, ge=2)
    """KID: pictures of each subset; of smaller sets as many as there are."""
    inception_splits: int = Field(default=10, ge=1)
    """Inception Score: parts of the pictures that it is averaged over."""


class EvaluatePriorConfig(EvaluateConfig):
    """Which prior to judge, and by which held-out captions."""

    bundle: str = ""
    """Folder or s3:// address of the bundle with the prior; required."""
    records: str = ""
    """Records with captions and embeddings that the prior was not trained on, as jobs/embed.py writes them; required."""
    options: PriorOptions = PriorOptions()
    """Changes to how it samples; what is null stays as the bundle has it."""


class EvaluateUpsamplerConfig(EvaluateConfig):
    """Which upsampler to judge, and by which held-out pictures."""

    bundle: str = ""
    """Folder or s3:// address of the bundle with the upsampler; required."""
    stage: UpsamplerName = "upsampler_256"
    """Which of its upsamplers."""
    records: str = ""
    """Records with pictures that it was not trained on, at least as large as its own; required."""
    options: SamplerOptions = SamplerOptions()
    """Changes to how it samples; what is null stays as the bundle has it."""
    clip: str | None = None
    """CLIP for the distance between samples and real pictures: an open_clip name, `hf-hub:…`, or a folder; null leaves it out."""
    lpips: str | None = None
    """safetensors file with the weights of LPIPS (AlexNet), an address or `hf-hub:ORG/NAME[@REVISION]/FILE`; null leaves it
    out."""
    microbatch: int = Field(default=4, ge=1)
    """Pictures that pass a network at once; another number may change them in the last bit."""
