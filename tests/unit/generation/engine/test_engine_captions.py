"""What is computed of captions, and how often: counted at the text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tests.support.engines import randomized, run, unit
from torch import nn

from unclip.generation.engine.captions import Captions
from unclip.generation.engine.config import EngineConfig
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.request import Request
from unclip.generation.engine.route import Stages
from unclip.models.clip import ClipModel
from unclip.models.noised_clip import NoisedClipModel
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.guides import ClipGuide
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import stage_config_from_dict

TEXT = {"context_length": 12, "width": 16, "depth": 1, "heads": 2}
GUIDE = {
    "kind": "noised_clip",
    "model": {"embed_dim": 8, "image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "text": TEXT},
    "diffusion": {"num_train_timesteps": 50},
}

Count = Callable[[nn.Module], list[int]]


@pytest.fixture
def count() -> Iterator[Count]:
    """The rows of each call of a module from then on."""
    hooks = []

    def watch(module: nn.Module) -> list[int]:
        calls: list[int] = []
        hooks.append(module.register_forward_hook(lambda _module, _inputs, output: calls.append(len(output))))
        return calls

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.fixture
def clip(pipeline: Pipeline) -> ClipModel:
    assert isinstance(pipeline.clip, ClipModel)
    return pipeline.clip


def test_the_captions_that_were_asked_for_last_are_kept(pipeline: Pipeline, clip: ClipModel, count: Count) -> None:
    captions, calls = Captions(Stages.of(pipeline)), count(clip._final_norm)
    (first,) = captions.encode([("the first", None)])
    captions.encode((f"caption {number}", None) for number in range(255))
    assert captions.encode([("the first", None), ("caption 254", None), ("the first", None)])[2] is first
    assert calls == [1, 255]
    captions.encode([("one more", None)])
    captions.encode([("the first", None), *((f"caption {number}", None) for number in range(1, 255))])
    assert calls == [1, 255, 1]
    captions.encode([("caption 0", None)])
    assert calls == [1, 255, 1, 1]


def test_more_captions_at_once_than_are_kept_are_all_answered(pipeline: Pipeline) -> None:
    texts = [(f"caption {number}", None) for number in range(300)]
    together = Captions(Stages.of(pipeline)).encode(texts)
    alone = [Captions(Stages.of(pipeline)).encode([text])[0] for text in (texts[0], texts[299])]
    for caption, expected in zip((together[0], together[299]), alone, strict=True):
        torch.testing.assert_close(caption.text_embed, expected.text_embed)


def test_upsamplers_encode_nothing(pipeline: Pipeline, clip: ClipModel, count: Count) -> None:
    engine, calls = Engine(Stages.of(pipeline), EngineConfig(memory_bytes=2**33)), count(clip._final_norm)
    engine.submit(Request(prompt="two dogs", low_res=np.zeros((16, 16, 3), np.uint8)))
    run(engine)
    assert calls == []


def test_what_a_caption_is_guided_towards_is_computed_once(pipeline: Pipeline, count: Count) -> None:
    config = stage_config_from_dict(GUIDE)
    model = randomized(config)
    assert isinstance(model, NoisedClipModel)
    pipeline.guides = {"noised_clip": ClipGuide(config, model)}
    engine, calls = Engine(Stages.of(pipeline), EngineConfig(memory_bytes=2**33)), count(model.caption_tower)
    scales = [("two dogs", 0.0), ("two dogs", 30.0), ("two dogs", 60.0), ("a red apple", 30.0)]
    for seed, (prompt, scale) in enumerate(scales):
        options = GenerationOptions().merged({"up_to": 16, "decoder": {"clip_guidance_scale": scale}})
        engine.submit(Request(prompt=prompt, image_embed=unit(seed), seed=seed, options=options))
    run(engine)
    assert len(calls) == 2
