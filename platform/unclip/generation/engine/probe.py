"""How many rows an engine's stages may have: by the memory of rows of the dearest kind, measured on the device itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from unclip.diffusion.samplers import SamplingConfig
from unclip.generation.engine.captions import Captions
from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.job import Job, Row
from unclip.generation.engine.pools import build_pool
from unclip.generation.engine.request import EncodedCaption, Request, Ticket
from unclip.generation.engine.route import AnyStage, Stages, part_of_a_cascade
from unclip.generation.engine.slots import StageMemory, divide
from unclip.pipelines.guides import ClassifierGuide, ClipGuide, GuideOptions
from unclip.pipelines.known import KnownPixels
from unclip.pipelines.options import AnySampling
from unclip.pipelines.pictures import PICTURE_CHANNELS
from unclip.pipelines.stages import DecoderStage, StageName, UpsamplerStage
from unclip.pipelines.stages.diffusion_stage import DiffusionStage
from unclip.utils.memory import free_memory, memory_of


def measured_slots(stages: Stages, config: EngineConfig) -> dict[StageName, int]:
    """Rows of each stage; `EngineError` with the figures where one of each does not fit."""
    budget = config.memory_bytes
    if budget is None:
        budget = int(config.memory_share * free_memory(stages.device))
    captions = Captions(stages)
    memory = {name: measured_memory(name, stages, captions) for name in stages.by_name}
    return divide(memory, {name: getattr(config.rows, name) for name in memory}, budget)


@torch.no_grad()
def measured_memory(name: StageName, stages: Stages, captions: Captions) -> StageMemory:
    """Takes a step with one row, and one with two: guided, in two halves, by every guide there is, with known pixels.

    Another one comes first: libraries take workspaces on their first call and keep them.
    """
    _, one, two = (_step_memory(name, stages, captions, rows) for rows in (1, 1, 2))
    return StageMemory.measured(one, two)


def _step_memory(name: StageName, stages: Stages, captions: Captions, count: int) -> tuple[int, int]:
    stage = stages.by_name[name]
    pool = build_pool(stage, stages)
    rows = [_dearest(name, stage, stages, number) for number in range(count)]
    told = captions.told([row.job for row in rows])

    def step() -> None:
        pool.admit([pool.enter(row, captions) for row, captions in zip(rows, told, strict=True)])
        pool.step()

    return memory_of(step, stages.device)


def _dearest(name: StageName, stage: AnyStage, stages: Stages, number: int) -> Row:
    """A row that takes as much as any, on the first of its two steps."""
    pairs, sizes = [], {}
    if isinstance(stage, DiffusionStage):
        pairs = [(stage.process.num_train_timesteps - 1, 0), (0, -1)]
    if isinstance(stage, DecoderStage | UpsamplerStage):
        sizes = {name: stage.config.image_size}
    sampling, guidance = _sampling(stage), _guidance(stages) if name == "decoder" else GuideOptions()
    ticket = Ticket(_request(stage, number))
    job = Job.of(ticket, part_of_a_cascade({name: sampling}, sizes, guidance), stages.device, 0.0)
    return Row(job, name, 0, sampling, pairs, 0.0)


def _sampling(stage: AnyStage) -> AnySampling:
    if not isinstance(stage, DiffusionStage):
        return stage.config.sampling.merged({"guidance_scale": 2.0})
    guidance_scale = 1.0 if isinstance(stage, UpsamplerStage) else 2.0
    return SamplingConfig(sampler="sde-dpmsolver++", num_inference_steps=2, guidance_scale=guidance_scale)


def _request(stage: AnyStage, number: int) -> Request:
    """Each `number` has captions of its own, where captions are: of equal ones some is computed once."""
    if isinstance(stage, UpsamplerStage):
        side = stage.config.low_res_size
        return Request(low_res=np.zeros((side, side, 3), dtype=np.uint8), known=_all_known(stage.config.image_size))
    embed = functional.normalize(torch.ones(stage.config.model.embed_dim or 1), dim=0)
    if not isinstance(stage, DecoderStage):
        return _captioned(Request(), number, EncodedCaption(embed))
    model = stage.config.model
    image_embed = None if model.embed_dim is None else embed
    request = Request(image_embed=image_embed, known=_all_known(stage.config.image_size))
    if stage.config.classes:
        return replace(request, prompt=stage.config.classes[0])
    states = model.text_states
    told = None if states is None else torch.zeros(states.context_length, states.state_dim)
    return _captioned(request, number, EncodedCaption(embed, told))


def _captioned(request: Request, number: int, encoded: EncodedCaption) -> Request:
    """With a prompt and a negative one, which need no CLIP."""
    prompt, negative = f"drawing {number}", f"painting {number}"
    return replace(request, prompt=prompt, encoded=encoded, negative_prompt=negative, negative_encoded=encoded)


def _all_known(size: int) -> dict[int, KnownPixels]:
    mask = torch.ones(1, size, size, dtype=torch.bool)
    return {size: KnownPixels(torch.zeros(1, size, size, PICTURE_CHANNELS, dtype=torch.uint8), mask)}


def _guidance(stages: Stages) -> GuideOptions:
    """Every guide of the engine."""
    clip, classifier = stages.guides.get("noised_clip"), stages.guides.get("classifier")
    label = classifier.config.classes[0] if isinstance(classifier, ClassifierGuide) else None
    return GuideOptions(
        clip_guidance_scale=float(isinstance(clip, ClipGuide)),
        classifier_guidance_scale=float(label is not None),
        class_label=label,
    )
