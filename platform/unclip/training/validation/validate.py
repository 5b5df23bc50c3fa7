"""One validation of one checkpoint, in this process: no Ray, no DeepSpeed."""

from __future__ import annotations

import torch
from torch import nn

from unclip.models.clip import ClipModel, load_clip
from unclip.training.checkpoint import Checkpoint
from unclip.training.config import TrainConfig
from unclip.training.export import full_state_dict
from unclip.training.objectives import Objective
from unclip.training.objectives.ar_prior import ARPriorObjectiveConfig
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.objectives.prior import PriorObjectiveConfig
from unclip.training.objectives.upsampler import UpsamplerObjectiveConfig
from unclip.training.validation.clip_scores import score_clip
from unclip.training.validation.decoder_scores import score_decoder
from unclip.training.validation.held_out_loss import held_out_loss
from unclip.training.validation.prior_scores import score_prior
from unclip.training.validation.records import HeldOut
from unclip.training.validation.result import Validation
from unclip.training.validation.upsampler_scores import score_upsampler


def validate(config: TrainConfig, checkpoint: Checkpoint, device: torch.device) -> Validation:
    """Held-out loss, scores and sample grid of the moving average in `checkpoint`, computed in float32.

    The same checkpoint gives the same answer on the same machine. Of the checkpoint only the weights are read, first of
    all. Stages sample with their own settings, those that they would be published with.

    Args:
        config: as `prepare_run` has made it, with its `validation` checked.
        device: where everything is computed.
    """
    weights = full_state_dict(checkpoint, "ema")
    objective = config.objective.build()
    objective.model.load_state_dict(weights)
    return validate_objective(config, objective.to(device), device)


@torch.no_grad()
def validate_objective(config: TrainConfig, objective: Objective, device: torch.device) -> Validation:
    """The same of the weights that the objective's model has; leaves it frozen, in evaluation mode."""
    objective.model.eval().requires_grad_(False)
    records = None if config.validation.data is None else HeldOut(config, device)
    metrics = {} if records is None else held_out_loss(config, objective, records)
    scored = _scores(config, objective.model, records, device)
    return Validation(metrics | scored.metrics, scored.grid)


def _scores(config: TrainConfig, model: nn.Module, records: HeldOut | None, device: torch.device) -> Validation:
    """What the samples of the stage are worth, where it samples; guides have their accuracy with the loss."""
    objective = config.objective
    if isinstance(objective, DecoderObjectiveConfig):
        clip = None if config.clip is None else load_clip(config.clip, device)
        return score_decoder(config, objective.stage, model, clip, records)
    assert records is not None  # what only a decoder can do without
    if isinstance(objective, UpsamplerObjectiveConfig):
        return score_upsampler(config, objective.stage, model, records)
    if isinstance(objective, PriorObjectiveConfig | ARPriorObjectiveConfig):
        return score_prior(config, objective.stage, model, records)
    if isinstance(objective, ClipObjectiveConfig):
        assert isinstance(model, ClipModel)
        return score_clip(config, model, records)
    return Validation({})
