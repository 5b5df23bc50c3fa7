"""What an upsampler makes of held-out pictures."""

from __future__ import annotations

from torch import nn

from unclip.evaluation.fidelity import peak_signal_to_noise
from unclip.models.upsampler import upsample_low_res
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.stages import UpsamplerStage, UpsamplerStageConfig
from unclip.training.config import TrainConfig
from unclip.training.validation.records import HeldOut
from unclip.training.validation.result import SampleGrid, Validation, parts
from unclip.utils.random import SampleGenerator


def score_upsampler(config: TrainConfig, stage: UpsamplerStageConfig, model: nn.Module, records: HeldOut) -> Validation:
    """PSNR of whole sampled pictures to the real ones, in dB, and of interpolated ones, which is there to be beaten.

    Unlike the held-out loss, which is one of degraded crops, this starts from whole, clean low-resolution pictures.
    """
    count = min(config.validation.rows, records.count)
    sampler = UpsamplerStage(stage, model)
    changes = {"crop_size": None, "low_res_size": stage.low_res_size, "degradation": "none"}
    spec = config.objective.batch_spec().merged(changes)
    captions = records.text("caption", count) if "caption" in records.manifest.columns else [""] * count
    rows, psnr, interpolated = [], [], []
    for part in parts(count, stage.image_size):
        numbers = range(part.start, part.stop)
        batch = records.pictures(numbers, spec)
        low_res, real = to_signed(batch["low_res"]), batch["image"]
        streams = SampleGenerator.for_samples(config.validation.seed, batch["position"]).child("sample")
        samples = to_uint8(sampler.sample(low_res, streams, sampling=stage.sampling))
        psnr += peak_signal_to_noise(samples, real).tolist()
        smooth = to_uint8(upsample_low_res(low_res, (stage.image_size, stage.image_size)))
        interpolated += peak_signal_to_noise(smooth, real).tolist()
        pictures = [batch["low_res"], samples, real]
        for index, row in enumerate(zip(*(picture.cpu().numpy() for picture in pictures), strict=True), part.start):
            rows.append((captions[index], row))
    metrics = {"psnr": sum(psnr) / count, "psnr_interpolated": sum(interpolated) / count}
    titles = (f"{stage.low_res_size} px", "sample", "real")
    return Validation(metrics, SampleGrid(titles, tuple(rows)))
