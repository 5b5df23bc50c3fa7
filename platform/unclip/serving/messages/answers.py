"""What clients are answered: OpenAI's objects, with what is ours beside it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from unclip.serving.messages.schemas import Form


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def to_json(self) -> bytes:
        """Without the fields that have nothing to say."""
        return self.model_dump_json(exclude_none=True).encode()


class ErrorObject(Answer):
    """What went wrong."""

    message: str
    """For people; it names the field and its value."""
    type: str
    """`invalid_request_error`, `rate_limit_error` or `server_error`."""
    param: str | None
    """The field that is to blame."""
    code: str | None
    """For programs."""


class ErrorAnswer(Answer):
    """Of every request that is refused or fails."""

    error: ErrorObject


class PictureAnswer(Answer):
    """A picture."""

    b64_json: str | None = None
    """Base64 of its file."""
    url: str | None = None
    """Where its file can be had for a while."""
    revised_prompt: str | None = None
    """Prompts are never revised."""
    seed: int
    """What all its randomness comes from."""
    revision: str
    """Digest of the weights that drew it."""
    parameters: dict[str, Any]
    """The fields of a request that draws this picture again; uploaded pictures have to be sent with them."""
    image_embed: list[float] | None = None
    """The CLIP image embedding that it was drawn from, of unit norm, where it was asked for."""
    share: float | None = None
    """Of an interpolation: where on the way it lies; 0 is the first picture, 1 the second, ..."""
    theta: float | None = None
    """Of a text diff: the share of the angle it has gone."""


class PicturesAnswer(Answer):
    """Pictures, in the order of their seeds or of the way that they show."""

    created: int
    """When, in unix seconds."""
    data: list[PictureAnswer]
    """The pictures."""
    background: Literal["opaque"] = "opaque"
    output_format: Form
    quality: Literal["high"] = "high"
    size: str
    """Width x height."""
    model: str
    """Name of the model that drew them."""
    revision: str
    """Digest of its weights when the first picture was drawn."""


class Embedding(Answer):
    """A text or picture in CLIP's space."""

    object: Literal["embedding"] = "embedding"
    index: int
    """Its place among the texts, and behind them the pictures."""
    embedding: list[float] | str
    """Of unit norm: numbers, or base64 of them as float32, little endian."""


class Usage(Answer):
    """Tokens are not counted."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingsAnswer(Answer):
    """Embeddings, those of texts first."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    """Name of the model."""
    revision: str
    """Digest of its weights."""
    usage: Usage = Usage()


class Sampling(Answer):
    """How a stage samples where a request does not say otherwise."""

    num_inference_steps: int | None = None
    """Denoising steps; null for an autoregressive prior."""
    guidance_scale: float | None = None
    """Classifier-free guidance, where the stage has it; 1 is off."""
    size: int | None = None
    """Side of its pictures."""


class ModelLimits(Answer):
    """What a request may ask for."""

    pictures_per_request: int
    """Largest n, and most pictures of an interpolation or text diff."""
    timeout_s: float
    """Longest time."""
    steps: int
    """Most denoising steps of a stage."""
    body_bytes: int
    """Largest body."""
    picture_pixels: int
    """Most pixels of an uploaded picture."""
    prompt_characters: int
    """Longest prompt."""


class ModelAnswer(Answer):
    """What can be asked of a model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When its weights were loaded, in unix seconds."""
    owned_by: str = "unclip"
    aliases: list[str]
    """Further names that requests may give."""
    revision: str
    """Digest of its weights."""
    sizes: list[int]
    """Sides of the pictures that its stages draw; smaller ones are scaled down."""
    stages: dict[str, Sampling]
    """The stages of its cascade, in their order."""
    embed_dim: int | None = None
    """Numbers of an image embedding; missing where the decoder is told none."""
    clip_image_size: int | None = None
    """Side of the pictures that its CLIP sees; missing where it has none."""
    classes: list[str]
    """What a prompt may be, where it draws classes; otherwise empty."""
    urls: bool
    """Whether pictures can be had by address."""
    limits: ModelLimits
    """What a request may ask for."""
    attribution: str | None = None
    """Whom the pictures that it was trained on came from."""


class ModelsAnswer(Answer):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class HealthAnswer(Answer):
    """Whether the server is able to draw."""

    status: Literal["ok", "failing"]
    reasons: list[str]
    """What is wrong."""
