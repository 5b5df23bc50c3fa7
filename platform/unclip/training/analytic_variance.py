"""Analytic-DPM's table for a trained prior (Bao et al. 2022), measured and put into its bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from unclip.config.base import Config, ConfigError
from unclip.data.batches import BatchSpec, make_batch
from unclip.data.manifest import DataError, Manifest, read_slices, scan
from unclip.diffusion.guidance import ConditionT, Denoise
from unclip.diffusion.process import DiffusionProcess
from unclip.models.prior import PriorCondition, PriorModel
from unclip.pipelines.bundle import Bundle, BundleError, save_stage
from unclip.pipelines.card import write_card
from unclip.pipelines.stages import PriorStageConfig
from unclip.utils import storage
from unclip.utils.progress import progress_bar
from unclip.utils.random import SampleGenerator

_COLUMNS = ("image_embed", "text_embed")


class FitAnalyticVarianceConfig(Config):
    """Whose reverse variances to measure, on which records."""

    bundle: str = ""
    """Bundle with a diffusion prior, which gets the table; required."""
    data: str = ""
    """Folder of Parquet shards with captions and the embeddings that jobs/embed.py adds; required."""
    records: int = Field(default=512, ge=1)
    """Records that the mean of each timestep is taken over, from row groups drawn at random."""
    batch_size: int = Field(default=128, ge=1)
    """Records that pass the network at once."""
    seed: int = Field(default=0, ge=0)
    """Seeds the choice of records and the noise."""
    device: str = "cpu"
    """A torch device."""


@dataclass(frozen=True)
class AnalyticVariance:
    """What `DiffusionConfig` holds of the analytic variance.

    noise_error: E|eps_hat(x_t, t)|^2 / D for each of the T timesteps. bound: E|x_start|^2 / D.
    """

    noise_error: tuple[float, ...]
    bound: float


def noise_error(
    denoise: Denoise[ConditionT],
    x_start: torch.Tensor,
    cond: ConditionT,
    *,
    process: DiffusionProcess,
    generator: SampleGenerator,
    progress: Callable[[], object] | None = None,
) -> torch.Tensor:
    """(T,) float64: the mean over `x_start` (B, D) of |eps_hat(x_t, t)|^2 / D, by one draw of noise for each t and sample.

    The Monte-Carlo Gamma_t of Bao et al. 2022, section 3. eps_hat is the noise that the network's prediction implies,
    thresholded as in sampling, so that a network that predicts x_start has one too.
    """
    errors = torch.zeros(process.num_train_timesteps, dtype=torch.float64)
    for timestep in range(process.num_train_timesteps):
        timesteps = torch.full((len(x_start),), timestep, device=x_start.device)
        x_t = process.q_sample(x_start, timesteps, generator.normal(tuple(x_start.shape[1:])))
        prediction, _ = process.split(denoise(x_t, timesteps, cond).to(x_t.dtype))
        pred_noise = process.pred_noise(process.pred_x_start(prediction, x_t, timesteps), x_t, timesteps)
        errors[timestep] = pred_noise.double().square().mean().cpu()
        if progress is not None:
            progress()
    return errors


@torch.no_grad()
def measure(
    stage: PriorStageConfig, model: PriorModel, manifest: Manifest, config: FitAnalyticVarianceConfig
) -> AnalyticVariance:
    """The table and bound of a prior on `config.records` of the records, without guidance.

    Every timestep is measured, none interpolated: the caption's part of the network runs once for all of them.
    """
    model.to(config.device).eval()
    process = stage.diffusion.build()
    normalizer = stage.normalizer.build().to(config.device)
    errors = torch.zeros(process.num_train_timesteps, dtype=torch.float64)
    squares, count = 0.0, 0
    batches = list(_batches(manifest, stage.model.context_length, config))
    with progress_bar(len(batches) * process.num_train_timesteps, "step", title="analytic variance") as bar:
        for batch in batches:
            cond = model.prepare(PriorCondition.of_captions(batch["text_embed"], batch["tokens"]))
            x_start = normalizer.normalize(batch["image_embed"])
            streams = SampleGenerator.for_samples(config.seed, batch["id"])
            errors += len(x_start) * noise_error(
                model, x_start, cond, process=process, generator=streams, progress=bar.update
            )
            squares += float(x_start.double().square().mean(dim=1).sum())
            count += len(x_start)
    return AnalyticVariance(tuple((errors / count).tolist()), squares / count)


def fit_analytic_variance(config: FitAnalyticVarianceConfig, *, dry_run: bool = False) -> AnalyticVariance | None:
    """Measures the bundle's prior and stores it again with the analytic variance; nothing is measured with `dry_run`.

    Raises `ConfigError`, `DataError`, `BundleError` or `OSError`.
    """
    for field in ("bundle", "data"):
        if not getattr(config, field):
            raise ConfigError(f"{field}: required, but not given")
    bundle = Bundle.load(config.bundle)
    stage = bundle.configs.get("prior")
    if not isinstance(stage, PriorStageConfig):
        raise BundleError(f"{bundle.uri!r} has no diffusion prior; it has {', '.join(bundle.configs) or 'none'}")
    manifest = scan(config.data, ("id", "caption", *_COLUMNS))
    _check_clip(bundle, manifest)
    storage.check_writable(bundle.uri)
    if dry_run:
        return None
    model = bundle.load_model("prior")
    assert isinstance(model, PriorModel)
    found = measure(stage, model, manifest, config)
    fitted = stage.merged(
        {
            "diffusion": {
                "variance_type": "analytic",
                "analytic_noise_error": list(found.noise_error),
                "analytic_variance_bound": found.bound,
            }
        }
    )
    stored = bundle.manifests["prior"]
    provenance = {**stored.provenance, "analytic_variance": config.to_dict()}
    save_stage(bundle.uri, fitted, tensors=model.state_dict(), clip=stored.clip, provenance=provenance)
    write_card(bundle.uri)
    return found


def _check_clip(bundle: Bundle, manifest: Manifest) -> None:
    """Refuses embeddings of another CLIP than the bundle's."""
    assert bundle.clip is not None  # a bundle with a prior has one
    facts = manifest.facts.get("clip")
    found = facts["fingerprint"] if facts else None
    if found != bundle.clip.fingerprint:
        raise DataError(
            f"data folder {manifest.uri!r} has embeddings of the CLIP with fingerprint {found}, bundle {bundle.uri!r} "
            f"belongs to {bundle.clip.fingerprint}"
        )


def _batches(
    manifest: Manifest, context_length: int, config: FitAnalyticVarianceConfig
) -> Iterator[dict[str, torch.Tensor]]:
    """`config.records` records, or all there are, in batches on the device."""
    spec = BatchSpec(tokenizer="simple", context_length=context_length, embeddings=_COLUMNS)
    left = min(config.records, manifest.rows)
    for index in np.random.default_rng(config.seed).permutation(len(manifest.fragments)):
        rows = min(left, manifest.fragments[index].rows)
        for start in range(0, rows, config.batch_size):
            stop = min(rows, start + config.batch_size)
            table = read_slices(manifest, [(int(index), start, stop)], spec.columns())
            batch: dict[str, npt.NDArray[np.generic]] = make_batch(table, np.arange(stop - start), spec, seed=0)
            yield {name: torch.from_numpy(array).to(config.device) for name, array in batch.items()}
        left -= rows
        if left == 0:
            return
