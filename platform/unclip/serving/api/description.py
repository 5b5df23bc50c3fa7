"""What the API says of the model that it serves."""

from __future__ import annotations

from unclip.diffusion.samplers import SamplingConfig
from unclip.pipelines.cascade import plan_cascade
from unclip.serving.drawing.service import Service
from unclip.serving.messages.answers import ModelAnswer, ModelLimits, Sampling
from unclip.serving.messages.schemas import PROMPT_CHARACTERS


def describe_model(service: Service) -> ModelAnswer:
    """Of the current weights."""
    config, model = service.config, service.models.current
    has_prior = "prior" in model.configs and model.embed_dim is not None
    cascade = plan_cascade(model.configs, model.options, with_prior=has_prior)
    stages = {}
    for name, sampling in cascade.sampling.items():
        steps = sampling.num_inference_steps if isinstance(sampling, SamplingConfig) else None
        guidance = None if name.startswith("upsampler") else sampling.guidance_scale
        stages[name] = Sampling(num_inference_steps=steps, guidance_scale=guidance, size=cascade.sizes.get(name))
    limits = config.limits
    return ModelAnswer(
        id=config.model,
        created=model.loaded_at,
        aliases=list(config.aliases),
        revision=model.digest,
        sizes=list(model.sizes),
        stages={str(name): stage for name, stage in stages.items()},
        embed_dim=model.embed_dim,
        clip_image_size=model.clip_image_size,
        classes=list(model.classes),
        urls=service.store is not None,
        limits=ModelLimits(
            pictures_per_request=limits.pictures_per_request,
            timeout_s=limits.timeout_s,
            steps=limits.steps,
            body_bytes=limits.body_bytes,
            picture_pixels=limits.picture_pixels,
            prompt_characters=PROMPT_CHARACTERS,
        ),
        attribution=model.attribution or None,
    )
