"""What a server is, from the bundle to its limits: one configuration for `serve run`, `serve deploy` and RayServices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.generation.engine.config import EngineConfig
from unclip.pipelines.cascade import GenerationOptions

GroupStage = Literal["clip", "prior", "decoder", "upsampler_256", "upsampler_1024"]
"""What a group may hold: CLIP, and the stages of the cascade in their order."""
STAGES: tuple[GroupStage, ...] = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")


class ReplicaConfig(Config):
    """What one process claims, and how many of it there are."""

    num_cpus: float = Field(1.0, ge=0)
    """CPUs of a process."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs of a process, or a share of one."""
    min_replicas: int = Field(1, ge=1)
    """Fewest processes."""
    max_replicas: int = Field(1, ge=1)
    """Most processes."""
    queued_steps: int = Field(2000, ge=1)
    """Denoising steps that wait or run in each process when there are enough of them: above it processes are added."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is less than min_replicas = {self.min_replicas}")
        if self.num_gpus > 1 and not self.num_gpus.is_integer():
            raise ValueError(f"num_gpus = {self.num_gpus}: a share of one GPU, or whole ones")
        return self


class GroupConfig(ReplicaConfig):
    """Stages that share a process."""

    stages: tuple[GroupStage, ...] = Field(min_length=1)
    """Which, in the order of the cascade."""
    memory_share: float = Field(0.8, gt=0, le=1)
    """Share of the device's free memory that the stages' batches may take."""


class IngressConfig(ReplicaConfig):
    """The processes that speak HTTP."""

    max_connections: int = Field(1000, ge=1)
    """HTTP requests that a process has open at once, streams and downloads among them."""


class LimitsConfig(Config):
    """What a server takes on."""

    pictures: int = Field(16, ge=1)
    """Pictures under way at once, of all processes that speak HTTP together; beyond it requests are refused at once."""
    pictures_per_request: int = Field(10, ge=1, le=64)
    """Largest n, and most frames of an interpolation or text diff."""
    timeout_s: float = Field(120.0, gt=0)
    """Longest time a request has; it may ask for less."""
    body_bytes: int = Field(32 * 2**20, ge=1024)
    """Largest body of a request."""
    picture_pixels: int = Field(4096 * 4096, ge=1)
    """Most pixels of a picture that is uploaded; known from its header, before it is decoded."""
    steps: int = Field(1000, ge=1)
    """Most denoising steps of a stage that a request may ask for."""
    stalled_s: float = Field(300.0, gt=0)
    """Longest step of an engine; one that takes longer fails the process's health check, and it is replaced."""


class ConceptConfig(Config):
    """Something that pictures or prompts may not show, known by its likeness in CLIP's space."""

    name: str = Field(min_length=1)
    """In the audit log."""
    texts: tuple[str, ...] = Field(min_length=1)
    """Captions of it."""
    picture_threshold: float | None = Field(None, ge=-1, le=1)
    """Cosine of a picture's embedding to the nearest of the texts from which on it is refused; null: is not looked at."""
    prompt_threshold: float | None = Field(None, ge=-1, le=1)
    """The same of a prompt's embedding."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.picture_threshold is None and self.prompt_threshold is None:
            raise ValueError(f"{self.name}: give picture_threshold, prompt_threshold or both")
        return self


class PolicyConfig(Config):
    """What may not be asked for or handed out."""

    blocklist: str | None = None
    """Text file with a word or phrase a line that no prompt may contain, whatever its case, accents or punctuation."""
    concepts: tuple[ConceptConfig, ...] = ()
    """Checked by CLIP, in prompts before and in pictures after they are drawn."""
    audit_prompts: bool = False
    """Writes prompts into the audit log. Without it, a keyed hash of a refused one is written."""


class ProvenanceConfig(Config):
    """What pictures say of where they come from, beside the metadata that each of them has."""

    c2pa_certificates: str | None = None
    """PEM file with the chain of the certificate that signs C2PA manifests; null for none."""
    c2pa_key: str | None = None
    """PEM file with its private key."""
    c2pa_algorithm: Literal["es256", "es384", "ps256", "ed25519"] = "es256"
    """How the key signs."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.c2pa_certificates is None) != (self.c2pa_key is None):
            raise ValueError("c2pa_certificates and c2pa_key: give both or none")
        return self


class PicturesConfig(Config):
    """Pictures that are handed out by address."""

    folder: str | None = None
    """Folder or s3:// address that all processes reach. Null: a folder of this machine where there is one process that
    speaks HTTP, and no addresses where there are more."""
    lifetime_s: int = Field(3600, ge=1)
    """How long an address is good for."""


class BatchesConfig(Config):
    """Lists of requests that are worked off by the bulk job."""

    folder: str | None = None
    """Folder or s3:// address for uploaded lists and what came of them, which all nodes reach; null for no batches."""
    max_requests: int = Field(50_000, ge=1)
    """Most lines of a list."""
    max_bytes: int = Field(200 * 2**20, ge=1024)
    """Largest list."""
    at_once: int = Field(1, ge=1)
    """Batches that are worked off at the same time; the others wait in their order."""
    actors: int | None = Field(None, ge=1)
    """Processes that draw for a batch; null for one a GPU of the cluster, those of the server among them, or one."""
    gpus_per_actor: float | None = Field(None, ge=0)
    """GPUs, or a share of one, that each of them claims; null for one where the cluster has any."""


class TracingConfig(Config):
    """Where traces go."""

    endpoint: str | None = None
    """OTLP collector over HTTP, as http://collector:4318/v1/traces; null for none."""
    share: float = Field(1.0, ge=0, le=1)
    """Of the requests that bring no decision of their own."""


class ServeConfig(Config):
    """A server of one bundle."""

    bundle: str = ""
    """Folder or s3:// address of the trained bundle; required. A running server changes to another one without a pause."""
    model: str = Field("unclip", pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")
    """Its name in the API."""
    aliases: tuple[str, ...] = ("dall-e-2",)
    """Further names that requests may give, as clients written for another service do."""
    options: GenerationOptions = GenerationOptions()
    """How each stage samples unless a request says otherwise, and the largest picture."""
    engine: EngineConfig = EngineConfig()
    """Bounds of the engines."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda)$")
    """Where the networks run; auto takes a CUDA device where a process has one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; the samplers always run in fp32."""
    ingress: IngressConfig = IngressConfig()
    """The processes that speak HTTP; where there are no groups, they hold all stages too."""
    groups: tuple[GroupConfig, ...] = ()
    """Stages by the processes that hold them; each of the bundle's stages in one group."""
    limits: LimitsConfig = LimitsConfig()
    """What is taken on."""
    keys: str | None = None
    """JSON file of hashed API keys, as jobs/api_key.py writes it; null: everybody may ask."""
    policy: PolicyConfig = PolicyConfig()
    """What is refused for its content."""
    provenance: ProvenanceConfig = ProvenanceConfig()
    """What pictures say of where they come from."""
    pictures: PicturesConfig = PicturesConfig()
    """Pictures that are handed out by address."""
    batches: BatchesConfig = BatchesConfig()
    """Lists of requests."""
    tracing: TracingConfig = TracingConfig()
    """Traces of requests."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        named = [stage for group in self.groups for stage in group.stages]
        if self.groups and named != [stage for stage in STAGES if stage in named]:
            raise ValueError(f"groups: {', '.join(named)}: each stage once, in the order {', '.join(STAGES)}")
        if self.groups and self.ingress.num_gpus:
            raise ValueError(f"ingress.num_gpus = {self.ingress.num_gpus}: the groups hold the stages; set it to 0")
        return self


def all_in_one() -> ServeConfig:
    """Everything in one process, for a machine with one GPU or none."""
    return ServeConfig()


def per_stage() -> ServeConfig:
    """Each stage in processes of its own, which grow with the steps that wait for them; shares of GPUs by the stages' work."""
    return ServeConfig(
        ingress=IngressConfig(min_replicas=2, max_replicas=2),
        groups=(
            GroupConfig(stages=("clip",), num_gpus=0.1),
            GroupConfig(stages=("prior",), num_gpus=0.4, max_replicas=4),
            GroupConfig(stages=("decoder",), num_gpus=1, max_replicas=8),
            GroupConfig(stages=("upsampler_256",), num_gpus=0.5, max_replicas=8),
            GroupConfig(stages=("upsampler_1024",), num_gpus=1, max_replicas=8),
        ),
        limits=LimitsConfig(pictures=256),
    )


RECIPES: Mapping[str, Callable[[], ServeConfig]] = {"all-in-one": all_in_one, "per-stage": per_stage}
"""By the name that `--recipe` and the argument `recipe` of `unclip.cluster.serve:build` know."""
