"""What clients may ask for: the bodies of requests, OpenAI's fields and ours."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unclip.config.base import Config
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.manipulations.interpolation import NoiseName
from unclip.pipelines.manipulations.text_diff import DUMMY_CAPTION, MAX_THETA
from unclip.pipelines.options import MAX_GUIDANCE_SCALE

Form = Literal["png", "jpeg", "webp"]
"""How pictures are encoded."""
Told = Literal["prior", "text_embedding", "none"]
"""What the decoder is told beside the caption."""

MAX_SEED = 2**62
PROMPT_CHARACTERS = 2000
MAX_INPUTS = 256
"""Texts and pictures of one request for embeddings."""
MAX_INPUT_CHARACTERS = 32_000
"""Of all these texts together."""
_MAX_WIDTH = 8192
"""Numbers of an embedding; far beyond any model."""

Prompt = Field(
    min_length=1, max_length=PROMPT_CHARACTERS, examples=["a red heart"], description="What the picture shall show."
)


class Body(Config):
    """Of a request; where null is allowed it means the default."""

    model: str | None = Field(None, max_length=128, examples=["unclip"])
    """The model's name or an alias of it, as `GET /v1/models` lists them; null for the one that is served."""
    user: str | None = Field(None, max_length=512)
    """Accepted as OpenAI has it, without effect."""


class DrawingBody(Body):
    """What every endpoint that draws pictures takes."""

    size: str | None = Field("auto", pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", examples=["64x64"])
    """Width x height of a square, or auto for the largest that the model draws. A size that no stage draws is scaled down,
    by area, from the next larger one."""
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    """The pictures themselves, or addresses where they can be had for a while."""
    output_format: Form | None = "png"
    """File format of the pictures."""
    output_compression: int | None = Field(None, ge=0, le=100)
    """Quality of JPEG and WebP in percent; null for the best one. PNG is always without loss."""
    background: Literal["auto", "opaque"] | None = "auto"
    """Pictures are always opaque."""
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    """Accepted as OpenAI has it, without effect: `num_inference_steps` is what decides."""
    moderation: Literal["auto", "low"] | None = None
    """Accepted as OpenAI has it, without effect: the server's operator decides what is refused."""
    safety_identifier: str | None = Field(None, max_length=512)
    """Accepted as OpenAI has it, without effect."""
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    """All randomness of the pictures: picture i has seed + i. Null for a random one, which the answer tells."""
    guidance_scale: float | None = Field(None, ge=0, le=MAX_GUIDANCE_SCALE)
    """Classifier-free guidance of the decoder; 1 is off, null as the model has it."""
    num_inference_steps: int | None = Field(None, ge=1)
    """Denoising steps of the decoder; null as the model has it."""
    include: list[Literal["image_embed"]] | None = None
    """What answers shall hold besides: `image_embed`, the CLIP image embedding z_i that each picture was drawn from."""
    timeout_s: float | None = Field(None, gt=0)
    """Seconds after which the request is given up; null for the server's limit."""
    options: GenerationOptions | None = None
    """How each stage samples, for experts; the size is not said here."""


class SeveralBody(DrawingBody):
    """Pictures that differ by their seeds."""

    n: int | None = Field(1, ge=1)
    """How many pictures."""


class StreamedBody(SeveralBody):
    """Pictures of a caption, which can be watched while they are drawn."""

    prompt: str = Prompt
    negative_prompt: str | None = Field(None, min_length=1, max_length=PROMPT_CHARACTERS, examples=["blurred"])
    """What guidance leads away from, in place of no caption at all."""
    prior: Told | None = "prior"
    """Where the image embedding comes from: drawn by the prior; the text embedding in its place; or none, the caption alone."""
    image_embed: list[float] | str | None = Field(None, max_length=8 * _MAX_WIDTH)
    """An image embedding of unit norm in place of the prior's: its numbers, or base64 of them as float32, little endian."""
    stream: bool | None = False
    """Answers by server-sent events."""
    partial_images: int | None = Field(0, ge=0, le=3)
    """How often each picture is shown in a stream before it is done."""
    progress: bool | None = False
    """Events `unclip.progress` in a stream, one for each denoising step."""


class GenerationBody(StreamedBody):
    """Pictures of a caption."""

    style: Literal["vivid", "natural"] | None = None
    """Accepted as OpenAI has it, without effect."""


class EditBody(StreamedBody):
    """A picture of which a part is drawn anew."""

    input_fidelity: Literal["high", "low"] | None = None
    """Accepted as OpenAI has it, without effect: what is kept is kept bit by bit."""


class VariationBody(SeveralBody):
    """Other pictures with the same image embedding."""


class InterpolationBody(DrawingBody):
    """The way from one picture to the next."""

    frames: int | None = Field(5, ge=2)
    """Pictures from each to the next, with both."""
    noise: NoiseName | None = "interpolated"
    """`interpolated`: between the noises that lead back to the pictures, so that both ends come back; `shared`: one noise for
    all, drawn from the seed."""


class TextDiffBody(DrawingBody):
    """A picture on its way towards a caption."""

    prompt: str = Prompt
    source_prompt: str | None = Field(DUMMY_CAPTION, max_length=PROMPT_CHARACTERS)
    """What the picture is a caption of now; empty for the direction of `prompt` itself."""
    frames: int | None = Field(5, ge=1)
    """Pictures on the way."""
    max_theta: float | None = Field(MAX_THETA, ge=0, le=1)
    """Share of the angle to the direction that the last picture has gone."""


class EmbeddingBody(Body):
    """Texts and pictures in CLIP's space."""

    input: str | list[str] | None = Field(None, max_length=MAX_INPUTS * PROMPT_CHARACTERS, examples=["a red heart"])
    """A text, or several."""
    images: list[str] | None = Field(None, max_length=MAX_INPUTS)
    """Pictures as base64 of PNG, JPEG or WebP files; their embeddings follow those of the texts."""
    encoding_format: Literal["float", "base64"] | None = "float"
    """Embeddings as lists of numbers, or as base64 of them as float32, little endian."""
