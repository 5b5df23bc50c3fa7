"""The subject that a configuration asks for."""

from __future__ import annotations

from unclip.evaluation.config import (
    EvaluateConfig,
    EvaluatePicturesConfig,
    EvaluatePriorConfig,
    EvaluateUpsamplerConfig,
)
from unclip.evaluation.subject import Subject
from unclip.evaluation.subjects.pictures import PicturesSubject
from unclip.evaluation.subjects.prior import PriorSubject
from unclip.evaluation.subjects.upsampler import UpsamplerSubject


def subject_of(config: EvaluateConfig) -> Subject:
    """With everything checked that can be checked; errors as of `EvaluationJob.prepare`."""
    if isinstance(config, EvaluatePicturesConfig):
        return PicturesSubject(config)
    if isinstance(config, EvaluatePriorConfig):
        return PriorSubject(config)
    assert isinstance(config, EvaluateUpsamplerConfig)
    return UpsamplerSubject(config)
