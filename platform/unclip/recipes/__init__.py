"""Complete configurations, one function each: `debug`, `demo`, `small` and `paper` for every stage.

`debug` takes two steps in seconds, `demo` trains in minutes on two CPU cores, `small` in a day on one large GPU, and `paper`
has the numbers of Ramesh et al. 2022 (unCLIP), Table 3 and appendix C. Where the paper is silent, a comment says what was
chosen and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from unclip.pipelines.stages import StageName
from unclip.recipes import ar_prior, classifier, clip, decoder, noised_clip, prior, upsampler_256, upsampler_1024
from unclip.training.config import TrainConfig

RecipeTable = Mapping[str, Callable[[], TrainConfig]]

RECIPES: Mapping[StageName, RecipeTable] = {
    "clip": clip.RECIPES,
    "noised_clip": noised_clip.RECIPES,
    "classifier": classifier.RECIPES,
    "prior": {**prior.RECIPES, **ar_prior.RECIPES},
    "decoder": decoder.RECIPES,
    "upsampler_256": upsampler_256.RECIPES,
    "upsampler_1024": upsampler_1024.RECIPES,
}
"""Recipes by stage and name; the first of each stage is the one that a job takes unless told otherwise."""
