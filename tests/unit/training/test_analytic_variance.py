"""The measured table of Analytic-DPM: against the closed form of Gaussian data, and by its job in a real bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jobs import fit_analytic_variance as job

from unclip.diffusion.guidance import Denoise
from unclip.diffusion.process import DiffusionConfig
from unclip.models.clip import Tokenizer
from unclip.models.prior import PriorCondition, PriorModel
from unclip.models.text import caption_mask
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.stages import PriorStageConfig
from unclip.training.analytic_variance import noise_error
from unclip.utils.random import SampleGenerator

T, D, SPREAD = 20, 8, 0.5


def perfect(process_config: DiffusionConfig) -> Denoise[None]:
    """The best answer there is for data that are N(0, SPREAD^2) in every component."""
    process = process_config.build()

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        abar = process.alphas_cumprod(timesteps)[:, None].float()
        total = abar * SPREAD**2 + 1 - abar
        noise, x_start = (1 - abar).sqrt() / total * x_t, abar.sqrt() * SPREAD**2 / total * x_t
        if process_config.prediction_type == "epsilon":
            return noise
        return (
            x_start if process_config.prediction_type == "sample" else abar.sqrt() * noise - (1 - abar).sqrt() * x_start
        )

    return denoise


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_of_gaussian_data_it_is_the_closed_form(prediction_type: str) -> None:
    """E|eps_hat|^2 / D = sigma_t^2 / (abar_t SPREAD^2 + sigma_t^2)."""
    config = DiffusionConfig.from_dict({"num_train_timesteps": T, "prediction_type": prediction_type})
    count = 6000
    keys = SampleGenerator.for_samples(0, torch.arange(count))
    x_start = SPREAD * keys.child("data").normal((D,))
    found = noise_error(perfect(config), x_start, None, process=config.build(), generator=keys)
    abar = config.build().alphas_cumprod(torch.arange(T))
    expected = (1 - abar) / (abar * SPREAD**2 + 1 - abar)
    assert found.dtype == torch.float64
    # A mean of squares of count * D normal numbers has a relative deviation of sqrt(2 / (count * D)) = 0.0065.
    torch.testing.assert_close(found, expected, rtol=5 * 0.0065, atol=0)


def test_predictions_are_thresholded_as_in_sampling() -> None:
    config = DiffusionConfig(num_train_timesteps=T, prediction_type="sample", clip_sample_range=0.5)

    def answering(value: float) -> torch.Tensor:
        return noise_error(
            lambda x_t, timesteps, cond: torch.full_like(x_t, value),
            torch.zeros(50, D),
            None,
            process=config.build(),
            generator=SampleGenerator.for_samples(0, torch.arange(50)),
        )

    torch.testing.assert_close(answering(7.0), answering(0.5))
    assert not torch.allclose(answering(0.5), answering(0.4))


@pytest.fixture
def bundle(tiny_bundle: str, tmp_path: Path) -> str:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle").as_posix()


@pytest.fixture
def records(bundle: str, tmp_path: Path) -> Path:
    """Thirty captions with embeddings of unit norm, as jobs/embed.py leaves them."""
    folder, rng = tmp_path / "records", np.random.default_rng(0)
    folder.mkdir()
    columns = {"id": pa.array(range(100, 130)), "caption": pa.array([f"a picture of {i}" for i in range(30)])}
    for name in ("image_embed", "text_embed"):
        vectors = rng.standard_normal((30, 8))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 8)
    pq.write_table(pa.table(columns), folder / "0.parquet", row_group_size=11)
    clip = Bundle.load(bundle).clip
    assert clip is not None
    facts = {"clip": {"source": clip.source, "fingerprint": clip.fingerprint, "embed_dim": 8}}
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


def by_hand(bundle: str, records: Path, timestep: int) -> tuple[float, float]:
    """The first draw's E|eps_hat|^2 / D at `timestep`, without anything prepared, and the data's mean square."""
    loaded = Bundle.load(bundle)
    stage, model = loaded.configs["prior"], loaded.load_model("prior")
    assert isinstance(stage, PriorStageConfig)
    assert isinstance(model, PriorModel)
    table = pq.read_table(records / "0.parquet")
    embeds = {
        name: torch.tensor(table.column(name).to_pylist(), dtype=torch.float32)
        for name in ("image_embed", "text_embed")
    }
    tokens = torch.from_numpy(Tokenizer(None)(table.column("caption").to_pylist(), 16)).long()
    cond = PriorCondition(embeds["text_embed"], tokens, caption_mask(tokens), torch.zeros(30, dtype=torch.bool))
    x_start, streams = embeds["image_embed"] / 0.3, SampleGenerator.for_samples(0, torch.arange(100, 130))
    for _ in range(timestep + 1):
        noise = streams.normal((8,))
    timesteps = torch.full((30,), timestep)
    abar = stage.diffusion.build().alphas_cumprod(timesteps)[:, None].float()
    x_t = abar.sqrt() * x_start + (1 - abar).sqrt() * noise
    eps = (x_t - abar.sqrt() * model(x_t, timesteps, cond)) / (1 - abar).sqrt()
    return float(eps.square().mean()), float(x_start.square().mean())


def test_the_job_writes_it_into_the_bundle(bundle: str, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Bundle.load(bundle)
    arguments = ["--set", f"bundle={bundle}", "--set", f"data={records}", "--set", "batch_size=8"]
    assert job.main([*arguments, "--dry-run"]) == 0
    assert Bundle.load(bundle).digest == before.digest
    assert job.main(arguments) == 0
    assert "samples with analytic variance" in capsys.readouterr().out
    after = Bundle.load(bundle)
    stage = after.configs["prior"]
    assert isinstance(stage, PriorStageConfig)
    assert stage.diffusion.variance_type == "analytic"
    assert stage.diffusion.analytic_noise_error is not None
    assert len(stage.diffusion.analytic_noise_error) == 50
    for timestep in (0, 20, 49):
        error, mean_square = by_hand(bundle, records, timestep)
        assert stage.diffusion.analytic_noise_error[timestep] == pytest.approx(error, rel=1e-3)
        assert stage.diffusion.analytic_variance_bound == pytest.approx(mean_square, rel=1e-5)
    # Nothing but that has changed, and everything can be loaded.
    assert after.manifests["prior"].weights == before.manifests["prior"].weights
    provenance = after.manifests["prior"].provenance
    assert provenance["step"] == 7
    assert provenance["analytic_variance"]["records"] == 512
    others = {name: entry for name, entry in after.manifests.items() if name != "prior"}
    assert others == {name: entry for name, entry in before.manifests.items() if name != "prior"}
    changed = {
        "diffusion": {"variance_type": "fixed_small", "analytic_noise_error": None, "analytic_variance_bound": 1.0}
    }
    assert stage.merged(changed) == before.configs["prior"]


def test_the_job_says_what_is_wrong(bundle: str, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*assignments: str) -> str:
        assert job.main([part for assignment in assignments for part in ("--set", assignment)]) == 2
        return capsys.readouterr().err

    assert "bundle: required" in refusal(f"data={records}")
    assert "is no bundle" in refusal(f"bundle={records}", f"data={records}")
    facts = json.loads((records / "manifest.json").read_text())
    facts["clip"]["fingerprint"] = "of another"
    (records / "manifest.json").write_text(json.dumps(facts))
    assert "CLIP with fingerprint of another" in refusal(f"bundle={bundle}", f"data={records}")
