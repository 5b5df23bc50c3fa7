"""What a decoder draws of fixed prompts, and what CLIP says to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from unclip.models.clip import ClipModel, Tokenizer
from unclip.pipelines.pictures import to_uint8
from unclip.pipelines.stages import DecoderStage, DecoderStageConfig
from unclip.pipelines.stages.checks import device_of
from unclip.training.config import TrainConfig
from unclip.training.validation.records import Batch, HeldOut
from unclip.training.validation.result import SampleGrid, Validation, parts
from unclip.utils.random import SampleGenerator

SAMPLES = 2
"""Pictures of each prompt, with noise of their own."""


@dataclass(frozen=True)
class _Prompts:
    """What is drawn: captions, what the decoder is told of each (rows), and the real pictures where there are some."""

    captions: Sequence[str]
    told: Batch
    real: torch.Tensor | None


def score_decoder(
    config: TrainConfig, stage: DecoderStageConfig, model: nn.Module, clip: ClipModel | None, records: HeldOut | None
) -> Validation:
    """CLIP-scores, mean cosines of CLIP's embeddings of samples, and the grid they are taken on.

    `clip_score` is the one to the prompt, `clip_score_image` to the z_i that was drawn from, `clip_score_real` what the
    real pictures have, seen at the decoder's size. Without `clip` there is the grid alone.

    Records are drawn from their own z_i; `validation.prompts` have none, and z_t stands in for it (unCLIP, section 5.1).
    """
    sampler = DecoderStage(stage, model)
    device = device_of(model)
    if config.validation.prompts or records is None:
        prompts = _of_captions(config.validation.prompts, stage, clip, device)
    else:
        prompts = _of_records(records, config.validation.rows, stage)
    count = len(prompts.captions)
    drawn = []
    for number in range(SAMPLES):
        keys = torch.arange(count, device=device) * SAMPLES + number
        streams = SampleGenerator.for_samples(config.validation.seed, keys).child("sample")
        drawn.append(
            torch.cat([_draw(sampler, prompts.told, streams, part) for part in parts(count, stage.image_size)])
        )
    columns = ([] if prompts.real is None else [("real", prompts.real)]) + [
        (f"sample {number + 1}", pictures) for number, pictures in enumerate(drawn)
    ]
    pictures = zip(*(column.cpu().numpy() for _, column in columns), strict=True)
    grid = SampleGrid(tuple(title for title, _ in columns), tuple(zip(prompts.captions, pictures, strict=True)))
    return Validation({} if clip is None else _clip_scores(clip, prompts, drawn), grid)


def _draw(sampler: DecoderStage, told: Batch, streams: SampleGenerator, part: slice) -> torch.Tensor:
    inputs = {name: column[part] for name, column in told.items()}
    pictures = sampler.sample(
        inputs.pop("image_embed", None),
        inputs.pop("tokens", None),
        SampleGenerator(streams.keys[part]),
        sampling=sampler.config.sampling,
        further=inputs,
    )
    return to_uint8(pictures)


def _of_records(records: HeldOut, rows: int, stage: DecoderStageConfig) -> _Prompts:
    """The first held-out records: their captions, and what training tells of them."""
    batch = records.first(rows)
    inputs = {name: batch[name] for name in _told(stage)}
    if "tokens" in inputs:
        inputs["tokens"] = inputs["tokens"].long()
    if "image_embed" in inputs:
        inputs["image_embed"] = functional.normalize(inputs["image_embed"].float(), dim=1)
    states = stage.model.text_states
    if states is not None:
        inputs["text_states"] = inputs["text_states"].float().unflatten(1, (states.context_length, states.state_dim))
    captions = _named(records, len(batch["id"]), stage)
    return _Prompts(captions, inputs, batch["image"])


def _named(records: HeldOut, count: int, stage: DecoderStageConfig) -> list[str]:
    """What is said of each record: its class where that is all that the decoder is told, else its caption."""
    column = stage.label_column if _told(stage) == ["label"] else "caption"
    return records.text(column, count) if column and column in records.manifest.columns else [""] * count


def _of_captions(
    captions: Sequence[str], stage: DecoderStageConfig, clip: ClipModel | None, device: torch.device
) -> _Prompts:
    """Captions that have no picture; of a decoder of classes they are the names of those."""
    told, inputs = _told(stage), {}
    length = stage.model.context_length
    if length is not None:
        inputs["tokens"] = torch.from_numpy(Tokenizer(None)(captions, length)).to(device, torch.int64)
    if "label" in told:
        inputs["label"] = torch.tensor([stage.classes.index(caption) for caption in captions], device=device)
    if clip is not None:
        tokens = clip.tokenize(captions)
        if "image_embed" in told:
            inputs["image_embed"] = clip.encode_text(tokens)
        if "text_states" in told:
            inputs["text_states"] = clip.encode_text_states(tokens)[1]
    return _Prompts(captions, inputs, None)


def _told(stage: DecoderStageConfig) -> list[str]:
    """What the decoder is told beside known pixels, of which there are none here."""
    return [name for name in stage.model.inputs if name not in ("known", "known_mask")]


def _clip_scores(clip: ClipModel, prompts: _Prompts, drawn: list[torch.Tensor]) -> dict[str, float]:
    text = clip.encode_text(clip.tokenize(prompts.captions))
    samples = [clip.encode_image(pictures) for pictures in drawn]
    scores = {"clip_score": torch.stack([(embed * text).sum(dim=1) for embed in samples])}
    if "image_embed" in prompts.told:
        given = prompts.told["image_embed"]
        scores["clip_score_image"] = torch.stack([(embed * given).sum(dim=1) for embed in samples])
    if prompts.real is not None:
        scores["clip_score_real"] = (clip.encode_image(prompts.real) * text).sum(dim=1)
    return {name: float(cosines.mean()) for name, cosines in scores.items()}
