"""`UnCLIPScheduler`: its settings are our process, its steps our ancestral sampler over evenly spaced timesteps.

Its tables are float32 where ours are float64: the last step, at timestep 0, gives 0.99947 of the picture there, where it
should be all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unclip.diffusion.process import DiffusionConfig
from unclip.diffusion.respacing import TimestepSpacing, sampling_timesteps
from unclip.diffusion.samplers import SamplingConfig
from unclip.interop.keys import InteropError
from unclip.interop.settings import Settings

SPACING: TimestepSpacing = "linspace"
_VARIANCES = {"fixed_small": "fixed_small_log", "learned_range": "learned_range"}
_PREDICTIONS = ("epsilon", "sample")
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
}


def process_of(part: str, settings: Mapping[str, Any]) -> DiffusionConfig:
    """The process of an `UnCLIPScheduler`."""
    if settings.get("_class_name") != "UnCLIPScheduler":
        raise InteropError(f"{part}: _class_name = {settings.get('_class_name')!r}: only UnCLIPScheduler is taken over")
    left = Settings(part, settings, _DEFAULTS)
    left.must(beta_schedule="squaredcos_cap_v2")
    variances = {theirs: ours for ours, theirs in _VARIANCES.items()}
    variance, prediction = left.take("variance_type", str), left.take("prediction_type", str)
    for name, value, known in (
        ("variance_type", variance, tuple(variances)),
        ("prediction_type", prediction, _PREDICTIONS),
    ):
        if value not in known:
            raise InteropError(f"{part}: {name} = {value!r}: must be one of {', '.join(known)}")
    clips, clip_range = left.take("clip_sample", bool), left.take("clip_sample_range", (int, float))
    found = DiffusionConfig.from_dict(
        {
            "beta_schedule": "squaredcos_cap_v2",
            "num_train_timesteps": left.take("num_train_timesteps", int),
            "prediction_type": prediction,
            "variance_type": variances[variance],
            "clip_sample_range": float(clip_range) if clips else None,
        }
    )
    left.done()
    return found


def scheduler_of(stage: str, diffusion: DiffusionConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """The settings of the `UnCLIPScheduler` that takes the same steps; `InteropError` names what it does not have."""
    refused = [
        (f"diffusion.{name}", getattr(diffusion, name), allowed)
        for name, allowed in (
            ("beta_schedule", ("squaredcos_cap_v2",)),
            ("zero_terminal_snr", (False,)),
            ("dynamic_threshold", (None,)),
            ("variance_type", tuple(_VARIANCES)),
            ("prediction_type", _PREDICTIONS),
        )
    ]
    refused += [
        (f"sampling.{name}", getattr(sampling, name), allowed)
        for name, allowed in (("sampler", ("ddpm",)), ("guidance_interval", (None,)))
    ]
    for name, value, allowed in refused:
        if value not in allowed:
            raise InteropError(
                f"{stage}: {name} = {value!r}: diffusers' UnCLIPScheduler has {' or '.join(map(repr, allowed))} alone"
            )
    steps, total = sampling.num_inference_steps, diffusion.num_train_timesteps
    if steps < 2:
        raise InteropError(f"{stage}: sampling.num_inference_steps = {steps}: UnCLIPScheduler needs at least 2")
    if sampling.timesteps(total) != sampling_timesteps(total, steps, SPACING):
        raise InteropError(
            f"{stage}: sampling visits other timesteps than UnCLIPScheduler's, which are those of linspace"
        )
    return {
        "_class_name": "UnCLIPScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": total,
        "prediction_type": diffusion.prediction_type,
        "variance_type": _VARIANCES[diffusion.variance_type],
        "clip_sample": diffusion.clip_sample_range is not None,
        "clip_sample_range": 1.0 if diffusion.clip_sample_range is None else diffusion.clip_sample_range,
    }
