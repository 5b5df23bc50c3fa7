"""An upsampler: what it makes of held-out pictures that were made small, against the pictures themselves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from unclip.config.base import ConfigError
from unclip.data.batches import Batch, BatchSpec, make_batch
from unclip.data.decode import Picture, open_image
from unclip.data.manifest import DataError
from unclip.evaluation.bundle_stage import BundleStage, streams_of
from unclip.evaluation.config import EvaluateUpsamplerConfig
from unclip.evaluation.distances import ClipDistance, Distance, LpipsDistance
from unclip.evaluation.extractors import Network
from unclip.evaluation.feature_folder import FeatureFolder, Features
from unclip.evaluation.fidelity import SSIM_WINDOW, colour_drift, peak_signal_to_noise, structural_similarity
from unclip.evaluation.pictures import Unit, choose, open_records
from unclip.evaluation.subject import Judgement, check_given, settings_of
from unclip.evaluation.upsampler_metrics import INTERPOLATED, upsampler_metrics
from unclip.evaluation.upsampler_report import ShownPicture, upsampler_page
from unclip.evaluation.weights import absolute_weights
from unclip.models.upsampler import upsample_low_res
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.clips import absolute_clip, load_clip_named
from unclip.pipelines.options import AnySampling
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.stages import UpsamplerStage, UpsamplerStageConfig
from unclip.utils import storage

RECORDS, SAMPLE, _IS_SHOWN = "records", "sample", "is_shown"
_NUMBERS = ("psnr", "ssim", "red", "green", "blue", "saturation")
_SETTINGS = ("limit", "seed", "resamples", "show")
_RECORDS_FILE = "pictures.parquet"


class UpsamplerSampler:
    """Numbers of each picture, float64 (B,), of the sample and of plain interpolation; the samples of the page, as PNG.

    Args:
        sampling: how it samples.
        distances: further numbers, by networks.
        seed: with a record's id, its noise.
    """

    def __init__(self, stage: BundleStage, sampling: AnySampling, distances: Sequence[Distance], seed: int) -> None:
        self._bundle, self._sampling, self._distances, self._seed = stage, sampling, tuple(distances), seed
        self._stage: UpsamplerStage | None = None
        numbers = [*_NUMBERS, *(distance.name for distance in distances)]
        self.columns: tuple[str, ...] = (*numbers, *(name + INTERPOLATED for name in numbers), SAMPLE)

    def setup(self, device: str) -> None:
        config, model = self._bundle.load(device)
        assert isinstance(config, UpsamplerStageConfig)
        self._stage, self._device = UpsamplerStage(config, model), device
        for distance in self._distances:
            distance.setup(device)

    @torch.no_grad()
    def extract(self, inputs: Batch) -> Batch:
        assert self._stage is not None, "setup() comes before extract()"
        real = torch.tensor(inputs["image"]).to(self._device)
        low_res = torch.tensor(inputs["low_res"]).to(self._device)
        streams = streams_of(self._seed, torch.tensor(inputs["id"]), self._device)
        sampled = to_uint8(self._stage.sample(to_signed(low_res), streams, sampling=self._sampling))  # type: ignore[arg-type]
        smooth = interpolated(low_res, self._stage.config.image_size)
        columns = self._numbers(sampled, real)
        columns |= {name + INTERPOLATED: values for name, values in self._numbers(smooth, real).items()}
        made: Batch = {name: values.double().cpu().numpy() for name, values in columns.items()}
        made[SAMPLE] = np.empty(len(real), dtype=object)
        for row in np.flatnonzero(inputs[_IS_SHOWN]):
            made[SAMPLE][row] = _png(sampled[row].cpu().numpy())
        return made

    def _numbers(self, pictures: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "psnr": peak_signal_to_noise(pictures, real),
            "ssim": structural_similarity(pictures, real),
            **colour_drift(pictures, real),
            **{distance.name: distance.between(pictures, real) for distance in self._distances},
        }


class UpsamplerSubject:
    """A bundle's upsampler; `ConfigError`, `BundleError` or `DataError` where it cannot be judged.

    Args:
        config: with an absolute `out`.
    """

    roles: tuple[str, ...] = (RECORDS,)

    def __init__(self, config: EvaluateUpsamplerConfig) -> None:
        check_given(config, ["bundle", RECORDS])
        self.config = config
        bundle = Bundle.load(config.bundle)
        stage = BundleStage.of(bundle, config.stage)
        upsampler = bundle.configs[config.stage]
        assert isinstance(upsampler, UpsamplerStageConfig)
        if upsampler.image_size < SSIM_WINDOW:
            raise ConfigError(
                f"stage = {config.stage!r}: makes {upsampler.image_size} pixels; SSIM needs {SSIM_WINDOW}"
            )
        sampling = config.options.apply("options", upsampler)
        self._spec = BatchSpec(image_size=upsampler.image_size, low_res_size=upsampler.low_res_size)
        records = open_records(RECORDS, config.records, ("image",), captions=False)
        chosen = choose(RECORDS, records, limit=config.limit, seed=config.seed, row_bytes=self._spec.row_bytes)
        self.sets = {RECORDS: chosen}
        self.folders = {RECORDS: FeatureFolder(storage.join(config.out, "features", RECORDS))}
        distances = _distances(config)
        self._sampler = UpsamplerSampler(stage, sampling, distances, config.seed)
        self._shown = frozenset(
            np.linspace(0, chosen.rows - 1, min(config.show, chosen.rows)).round().astype(int).tolist()
        )
        self.protocol: dict[str, Any] = {
            "kind": config.stage,
            RECORDS: chosen.protocol(),
            "bundle": stage.protocol,
            "sampling": {config.stage: sampling.to_dict()},
            "pictures": {
                "image_size": upsampler.image_size,
                "low_res_size": upsampler.low_res_size,
                "low_res": "means of squares of pixels, 8 bits a channel",
                "low_res_noise_level": upsampler.low_res_noise_level,
                "interpolation": "bilinear",
            },
            "distances": {distance.name: distance.protocol for distance in distances},
            "settings": settings_of(config, _SETTINGS),
        }

    def networks(self, name: str) -> Sequence[Network]:
        return (self._sampler,)

    def inputs(self, name: str, unit: Unit, table: pa.Table) -> Batch:
        try:
            batch = make_batch(table, np.arange(table.num_rows), self._spec, seed=0)
        except DataError as error:
            raise DataError(f"{self.sets[name].pictures.uri!r}: {error}") from None
        self._check_sizes(self.sets[name].pictures.uri, table)
        is_shown = np.array([number in self._shown for number in self.sets[name].numbers(unit)])
        return batch | {_IS_SHOWN: is_shown}

    def _check_sizes(self, uri: str, table: pa.Table) -> None:
        """Raises `DataError` naming a picture that had to be enlarged: what is not there cannot be compared with."""
        for record, image in zip(table.column("id").to_pylist(), table.column("image"), strict=True):
            width, height = open_image(image.as_py()).size
            if min(width, height) < self._spec.output_size:
                raise DataError(
                    f"{uri!r}: record {record}: has {width}x{height} pixels; {self.config.stage} makes "
                    f"{self._spec.output_size}x{self._spec.output_size}"
                )

    def folder_protocol(self, name: str) -> dict[str, Any]:
        return self.protocol

    def judge(self, gathered: Mapping[str, Features]) -> Judgement:
        features = gathered[RECORDS]
        columns = {name: values for name, values in features.columns.items() if name != SAMPLE}
        found = upsampler_metrics(columns, resamples=self.config.resamples, seed=self.config.seed)
        table = pa.table({"id": features.ids, "caption": pa.array(features.captions, pa.string()), **columns})
        page = upsampler_page(self.protocol, found, features, self._pictures(features))
        return Judgement(found, page, {_RECORDS_FILE: table})

    def _pictures(self, features: Features) -> list[ShownPicture]:
        shown = []
        for row, record in self.sets[RECORDS].records(sorted(self._shown)).items():
            batch = make_batch(record, np.arange(1), self._spec, seed=0)
            smooth = interpolated(torch.from_numpy(batch["low_res"]), self._spec.output_size)[0].numpy()
            sample: npt.NDArray[np.uint8] = np.asarray(Image.open(io.BytesIO(features.columns[SAMPLE][row])))
            shown.append(ShownPicture(row, batch["low_res"][0], sample, batch["image"][0], smooth))
        return shown


def interpolated(low_res: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (B, h, w, 3) -> uint8 (B, size, size, 3): what needs no network."""
    return to_uint8(upsample_low_res(to_signed(low_res), (size, size)))


def _distances(config: EvaluateUpsamplerConfig) -> list[Distance]:
    distances: list[Distance] = []
    if config.clip is not None:
        source = absolute_clip(config.clip)
        distances.append(ClipDistance(source, load_clip_named(source)))
    if config.lpips is not None:
        distances.append(LpipsDistance(absolute_weights(config.lpips)))
    return distances


def _png(picture: Picture) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    return sink.getvalue()
