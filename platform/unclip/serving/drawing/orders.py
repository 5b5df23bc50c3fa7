"""What API requests mean: pictures that the model can draw, planned before anything is done for them."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from unclip.diffusion.samplers import SamplingConfig
from unclip.generation.engine.request import Request
from unclip.pipelines.bundle import BundleError
from unclip.pipelines.cascade import UPSAMPLERS, GenerationOptions
from unclip.pipelines.stages import StageName, UpsamplerStageConfig
from unclip.serving.config import LimitsConfig
from unclip.serving.drawing.studio import Studio
from unclip.serving.errors import InvalidRequest
from unclip.serving.messages.schemas import DrawingBody, GenerationBody, SeveralBody, StreamedBody, VariationBody
from unclip.serving.stages.model import Model

Kind = Literal["generation", "edit", "variation", "interpolation", "text_diff"]
Prepare = Callable[[Studio], Awaitable[Sequence[Request]]]
T = TypeVar("T")

_RANDOM_SEEDS = 2**32
"""Short enough for people, and for JavaScript's numbers."""
_NOT_REPEATED = {
    *(
        "model",
        "user",
        "safety_identifier",
        "quality",
        "style",
        "moderation",
        "background",
        "input_fidelity",
        "include",
    ),
    *("stream", "partial_images", "progress", "response_format", "timeout_s", "n", "seed", "size", "image_embed"),
}
"""Fields that change nothing of a picture, and those that are told by their value in effect."""
_BLAMED = re.compile(r"(prompt|negative_prompt|image_embed|seed|options(?:\.\w+)*)\b")


@dataclass(frozen=True)
class Order:
    """Pictures of one API request.

    Args:
        model: that can draw them.
        side: of the pictures, at most that of the ones that are drawn, in pixels.
        requests: what is drawn, one for each picture; with `prepare`, what is known of it beforehand.
        extras: what an answer says of each picture besides.
        texts: that the policy looks at.
        prepare: reads what was uploaded, asks CLIP, and returns the requests.
        is_composite: whether the pictures hold parts of an uploaded one.
    """

    kind: Kind
    body: DrawingBody
    model: Model
    side: int
    requests: Sequence[Request]
    extras: Sequence[Mapping[str, float]]
    texts: tuple[str, ...] = ()
    prepare: Prepare | None = None
    is_composite: bool = False
    parameters: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", _repeated(self.body))

    @property
    def size(self) -> str:
        """Width x height."""
        return f"{self.side}x{self.side}"

    def repeats(self, picture: int) -> dict[str, Any]:
        """The fields of a request that draws picture number `picture` again."""
        several = {"n": 1} if isinstance(self.body, SeveralBody) else {}
        return {"seed": self.requests[picture].seed, "size": self.size, **several, **self.parameters}


def generation(body: GenerationBody, model: Model, limits: LimitsConfig) -> Order:
    """Pictures of a caption; `InvalidRequest` where the model cannot draw them."""
    return captioned("generation", body, model, limits)


def captioned(kind: Kind, body: StreamedBody, model: Model, limits: LimitsConfig) -> Order:
    """Pictures of a caption, whatever else is known of them; `InvalidRequest` where the model cannot draw them."""
    if not body.stream and (body.partial_images or body.progress):
        raise InvalidRequest("partial_images, progress: are for streams; set stream to true", param="stream")
    native, side = sizes(body, model)
    request = _told(
        Request(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            options=options_of(body, model, native),
            seed=seed(body),
        ),
        body,
        model,
    )
    requests = _several(body, request, model, limits)
    texts = tuple(text for text in (body.prompt, body.negative_prompt) if text)
    prepare = _with_text_embeds(requests) if body.prior == "text_embedding" else None
    return Order(kind, body, model, side, requests, [{}] * len(requests), texts, prepare)


def variation(body: VariationBody, model: Model, limits: LimitsConfig, prepare: Prepare) -> Order:
    """Pictures with the image embedding that `prepare` finds; `InvalidRequest` where the model cannot draw them."""
    native, side = sizes(body, model)
    request = Request(image_embed=stand_in(model), options=options_of(body, model, native), seed=seed(body))
    requests = _several(body, request, model, limits)
    return Order("variation", body, model, side, requests, [{}] * len(requests), prepare=prepare)


def sizes(body: DrawingBody, model: Model) -> tuple[int, int]:
    """Side of the pictures that are drawn, and of those that are handed out."""
    size = body.size or "auto"
    if size == "auto":
        return model.sizes[-1], model.sizes[-1]
    width, height = map(int, size.split("x"))
    native = next((side for side in model.sizes if side >= width), None)
    if width != height or native is None:
        known = ", ".join(f"{side}x{side}" for side in model.sizes)
        raise InvalidRequest(
            f"size = {size!r}: must be a square up to the largest of {known}", code="invalid_size", param="size"
        )
    return native, width


def seed(body: DrawingBody) -> int:
    """Of the first picture."""
    return secrets.randbelow(_RANDOM_SEEDS) if body.seed is None else body.seed


def options_of(body: DrawingBody, model: Model, native: int) -> GenerationOptions:
    """The server's options, changed as the body says, for pictures of `native` pixels."""
    expert = {} if body.options is None else body.options.model_dump(mode="json", exclude_unset=True)
    if expert.get("up_to") is not None:
        raise InvalidRequest("options.up_to: say it by `size`", code="invalid_value", param="options.up_to")
    short = {"guidance_scale": body.guidance_scale, "num_inference_steps": body.num_inference_steps}
    decoder = {name: value for name, value in short.items() if value is not None}
    options = unless_refused(lambda: model.options.merged(expert), body)
    return unless_refused(lambda: options.merged({"up_to": native, "decoder": decoder}), body)


def stand_in(model: Model) -> torch.Tensor:
    """An image embedding (D,) in place of one that is not known yet."""
    if model.embed_dim is None:
        raise InvalidRequest("the model's decoder is told no image embedding", code="unsupported", param="model")
    return torch.eye(1, model.embed_dim)[0]


def check(request: Request, body: DrawingBody, model: Model, limits: LimitsConfig) -> None:
    """Raises `InvalidRequest` where the model cannot draw it, or it would take too long."""
    cascade = unless_refused(lambda: model.plan(request), body)
    for name, sampling in cascade.sampling.items():
        if isinstance(sampling, SamplingConfig) and sampling.num_inference_steps > limits.steps:
            param = f"options.{name}.num_inference_steps"
            if name == "decoder" and body.num_inference_steps is not None:
                param = "num_inference_steps"
            steps = f"{sampling.num_inference_steps} steps; at most {limits.steps} are allowed"
            raise InvalidRequest(f"{param}: {name} would take {steps}", code="invalid_value", param=param)


def check_count(count: int, limits: LimitsConfig, *, field: str) -> None:
    """Raises `InvalidRequest` where `field` asks for too many pictures."""
    if count > limits.pictures_per_request:
        most = limits.pictures_per_request
        raise InvalidRequest(
            f"{field}: makes {count} pictures; at most {most} are allowed", code="invalid_value", param=field
        )


def unless_refused(plan: Callable[[], T], body: DrawingBody) -> T:
    """What `plan` returns; what it says against the body, as clients are told it."""
    try:
        return plan()
    except (ValueError, BundleError) as error:
        message = str(error)
        short = [name for name in ("num_inference_steps", "guidance_scale") if getattr(body, name) is not None]
        named = next((name for name in short if name in message), None)
        blamed = _BLAMED.match(message)
        param = named or (blamed[1] if blamed else None)
        raise InvalidRequest(message, code="invalid_value", param=param) from error


def _told(request: Request, body: StreamedBody, model: Model) -> Request:
    """What the decoder is told beside the caption."""
    told = body.prior or "prior"
    if body.image_embed is not None:
        if told != "prior":
            raise InvalidRequest(f"prior = {told!r}: leave it out where image_embed is given", param="prior")
        return replace(request, image_embed=_embed(body.image_embed))
    if told == "text_embedding":
        return replace(request, image_embed=stand_in(model))
    return replace(request, stages=_without_prior(request, model)) if told == "none" else request


def _several(body: SeveralBody, request: Request, model: Model, limits: LimitsConfig) -> list[Request]:
    count = body.n or 1
    check_count(count, limits, field="n")
    check(request, body, model, limits)
    return [replace(request, seed=request.seed + index) for index in range(count)]


def _with_text_embeds(requests: Sequence[Request]) -> Prepare:
    async def prepare(studio: Studio) -> Sequence[Request]:
        embed = (await studio.text_embeds([requests[0].prompt or ""]))[0]
        return [replace(request, image_embed=embed) for request in requests]

    return prepare


def _without_prior(request: Request, model: Model) -> tuple[StageName, ...]:
    """The stages behind it, up to the size that is wanted."""
    found: list[StageName] = ["decoder"]
    for name in UPSAMPLERS:
        stage = model.configs.get(name)
        if isinstance(stage, UpsamplerStageConfig) and stage.image_size <= (request.options.up_to or stage.image_size):
            found.append(name)
    return tuple(found)


def _embed(sent: list[float] | str) -> torch.Tensor:
    """(D,) float32; whether D and its norm are right, planning says."""
    if not isinstance(sent, str):
        return torch.tensor(sent, dtype=torch.float32)
    try:
        content = base64.b64decode(sent, validate=True)
        return torch.from_numpy(np.frombuffer(content, "<f4").astype(np.float32))
    except (binascii.Error, ValueError):
        message = "image_embed: no base64 of numbers as float32"
        raise InvalidRequest(message, code="invalid_value", param="image_embed") from None


def _repeated(body: DrawingBody) -> dict[str, Any]:
    """What a request that repeats a picture says beside seed and size."""
    said = body.model_dump(mode="json", exclude_defaults=True, exclude=_NOT_REPEATED)
    said = {name: value for name, value in said.items() if value is not None}
    if body.options is not None:  # also what is as usual: the server's own options may not be
        said["options"] = body.options.model_dump(mode="json", exclude_unset=True)
    if isinstance(body, StreamedBody) and body.image_embed is not None:
        said["image_embed"] = base64.b64encode(_embed(body.image_embed).numpy().astype("<f4").tobytes()).decode()
    return said
