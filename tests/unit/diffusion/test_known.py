"""Known pixels: exact in the result, felt by the pixels around them, and nothing to rows that have none."""

from __future__ import annotations

import pytest
import torch
from tests.support.gaussian import CorrelatedDenoiser, Labels, process_of, streams

from unclip.diffusion.known import keep_known, known_pixels
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.samplers import MixedSampling, SamplingConfig

SHAPE = (3, 4, 4)
SAMPLINGS = {
    "ddpm": SamplingConfig(num_inference_steps=8),
    "ddim": SamplingConfig(sampler="ddim", num_inference_steps=8),
    "ddim eta": SamplingConfig(sampler="ddim", num_inference_steps=8, eta=0.7),
    "dpm": SamplingConfig(sampler="dpmsolver++", num_inference_steps=8),
    "guided": SamplingConfig(num_inference_steps=8, guidance_scale=3.0),
    "guided interval": SamplingConfig(num_inference_steps=8, guidance_scale=3.0, guidance_interval=(0.2, 0.7)),
}
PROCESSES = {
    "epsilon": {"clip_sample_range": 1.0},
    "epsilon learned": {"clip_sample_range": 1.0, "variance_type": "learned_range"},
    "sample": {"prediction_type": "sample"},
    "sample dynamic": {"prediction_type": "sample", "dynamic_threshold": 0.9},
    "v": {"prediction_type": "v_prediction"},
    "v from pure noise": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
}


def network(process: DiffusionProcess):
    """Some smooth function of everything it is given, with the channels that the process wants."""

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        output = 2 * torch.tanh(x_t.roll(1, -1) + cond.values.view(-1, 1, 1, 1) - timesteps.view(-1, 1, 1, 1) / 1000)
        return torch.cat([output, output.cos()], dim=1) if process.config.variance_type == "learned_range" else output

    return denoise


def pictures(count: int) -> torch.Tensor:
    return streams(count, seed=9).uniform(SHAPE) * 2 - 1


def sample(process, sampling, known=None, mask=None, *, count: int) -> torch.Tensor:
    guide = None if known is None else lambda denoise: known_pixels(denoise, known, mask, process)
    return sampling.sample(
        network(process),
        streams(count).normal(SHAPE),
        process,
        streams(count, seed=1),
        Labels(torch.linspace(-0.5, 0.5, count)),
        guide=guide,
    )


@pytest.mark.parametrize("settings", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_known_pixels_come_out_and_other_rows_do_not_notice(settings, sampling) -> None:
    """Row 0 is known all over, row 1 nowhere, row 2 in its left half."""
    process, known = process_of(**settings), pictures(3)
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    mask[0], mask[2, :, :, :2] = True, True
    found = sample(process, sampling, known, mask, count=3)
    free = sample(process, sampling, count=3)
    assert torch.equal(found[1], free[1])
    exact = {"rtol": 0, "atol": 0 if process.config.prediction_type == "sample" else 1e-5}
    torch.testing.assert_close(found[0], known[0], **exact)
    torch.testing.assert_close(found[2, :, :, :2], known[2, :, :, :2], **exact)
    assert (found[2, :, :, 2:] - free[2, :, :, 2:]).abs().max() > 1e-3  # its network saw the known half
    kept = keep_known(found, known, mask)
    assert torch.equal(kept[0], known[0])
    assert torch.equal(kept[1], free[1])


def test_unknown_pixels_are_drawn_towards_what_goes_with_the_known_one() -> None:
    """Of two strongly correlated pixels one is known: the other's mean follows it, by either sign."""
    process = process_of(prediction_type="sample")
    covariance = torch.tensor([[0.25, 0.24], [0.24, 0.25]])
    exact = CorrelatedDenoiser(process, torch.zeros(2), covariance)

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: None) -> torch.Tensor:
        return exact(x_t.flatten(1), timesteps, cond).view(x_t.shape)

    count = 256
    mask = torch.zeros(count, 1, 1, 2, dtype=torch.bool)
    mask[..., 0] = True
    means = []
    for value in (-0.6, 0.6):
        known = torch.full((count, 1, 1, 2), value)
        drawn = SamplingConfig(num_inference_steps=50).sample(
            denoise,
            streams(count).normal((1, 1, 2)),
            process,
            streams(count, seed=1),
            Labels(torch.zeros(count)),
            guide=lambda free, known=known: known_pixels(free, known, mask, process),
        )
        means.append(float(drawn[..., 1].mean()))
    assert means[0] < -0.3
    assert means[1] > 0.3


def test_rows_have_samplers_of_their_own() -> None:
    """Beside a row with another sampler and the same number of steps each comes out as alone."""
    process, known = process_of(), pictures(2)
    mask = streams(2, seed=3).uniform((1, 4, 4)) < 0.5
    configs = [SAMPLINGS["ddpm"], SAMPLINGS["ddim"].merged({"guidance_scale": 2.0})]
    x_T, labels = streams(2).normal(SHAPE), torch.tensor([0.1, 0.4])

    def drawn(rows: list[int]) -> torch.Tensor:
        return MixedSampling([configs[row] for row in rows]).sample(
            network(process),
            x_T[rows],
            process,
            streams(2, seed=1).select(torch.tensor(rows)),
            Labels(labels[rows]),
            guide=lambda denoise: known_pixels(denoise, known[rows], mask[rows], process),
        )

    together = drawn([0, 1])
    for row in (0, 1):
        torch.testing.assert_close(drawn([row])[0], together[row])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 1, 4, 4), r"mask must be bool \(2, 1, 4, 4\), True = known, not torch.float32 \(2, 1, 4, 4\)"),
        (torch.ones(2, 4, 4, dtype=torch.bool), r"not torch.bool \(2, 4, 4\)"),
    ],
)
def test_masks_of_other_shapes_and_types_are_refused(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        known_pixels(lambda *_: None, pictures(2), mask, process_of())


def test_pictures_of_another_size_are_refused() -> None:
    process = process_of()
    denoise = known_pixels(network(process), pictures(1), torch.ones(1, 1, 4, 4, dtype=torch.bool), process)
    with pytest.raises(ValueError, match=r"known must be \(1, 3, 8, 8\) as x_t"):
        denoise(torch.zeros(1, 3, 8, 8), torch.tensor([3]), Labels(torch.zeros(1)))
