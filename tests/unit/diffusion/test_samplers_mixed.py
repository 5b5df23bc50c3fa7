"""One batch of samples that are sampled in different ways: each comes out as it would alone."""

from __future__ import annotations

import pytest
import torch
from tests.support.gaussian import Labels, process_of, streams
from torch import nn

from unclip.diffusion.guidance import GuidedCondition
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.respacing import step_pairs
from unclip.diffusion.samplers import DDIM, DDPM, DPMSolverPP, MixedSampler, MixedSampling, SamplerState, SamplingConfig
from unclip.utils.random import SampleGenerator

SHAPE = (3, 2, 2)
SAMPLINGS = [
    SamplingConfig(num_inference_steps=5, guidance_scale=2.0),
    SamplingConfig(sampler="dpmsolver++", num_inference_steps=6, guidance_scale=1.5, timestep_spacing="trailing"),
    SamplingConfig(sampler="ddim", num_inference_steps=7, guidance_scale=3.5, guidance_interval=(0.2, 0.7)),
    SamplingConfig(num_inference_steps=9),
    SamplingConfig(sampler="ddim", num_inference_steps=9, eta=0.7, timestep_spacing="trailing"),
    SamplingConfig(sampler="sde-dpmsolver++", num_inference_steps=8, guidance_scale=2.0),
    SamplingConfig(sampler="ddim", num_inference_steps=2, eta=1.0, guidance_scale=0.0),
    SamplingConfig(sampler="dpmsolver++", num_inference_steps=4, timesteps_list=(970, 800, 420, 17)),
    SamplingConfig(sampler="sde-dpmsolver++", num_inference_steps=1),
]
LABELS = torch.linspace(-1, 1, len(SAMPLINGS))


class Network(nn.Module):
    """Small, and not linear in anything; counts its calls."""

    def __init__(self, *, learned_variance: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(14, 32, generator=generator) / 3
        self.second = torch.randn(32, 24 if learned_variance else 12, generator=generator) / 6
        self.calls = 0

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        self.calls += 1
        inputs = torch.cat([x_t.flatten(1), timesteps[:, None] / 1000, cond.values[:, None]], dim=1)
        return (torch.tanh(inputs @ self.first) @ self.second).reshape(len(x_t), -1, *SHAPE[1:])


def alone(row: int, network: Network, process: DiffusionProcess) -> torch.Tensor:
    generator = SampleGenerator.for_samples(0, torch.tensor([row]))
    x_T, cond = generator.normal(SHAPE), Labels(LABELS[row : row + 1])
    return SAMPLINGS[row].sample(network, x_T, process, generator, cond)


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_sample_in_a_mixed_batch_is_the_sample_alone(variance_type, order) -> None:
    process = process_of(variance_type=variance_type, dynamic_threshold=0.95)
    network = Network(learned_variance=variance_type == "learned_range")
    rows = list(range(len(SAMPLINGS)))[::order]
    generator = SampleGenerator.for_samples(0, torch.tensor(rows))
    x_T, counts = generator.normal(SHAPE), []
    together = MixedSampling([SAMPLINGS[row] for row in rows]).sample(
        network, x_T, process, generator, Labels(LABELS[rows]), progress=lambda *count: counts.append(count)
    )
    assert network.calls == 9  # one call a step, whatever is in the batch
    assert counts == [(step, 9) for step in range(1, 10)]
    for place, row in enumerate(rows):
        expected = alone(row, network, process)[0]
        torch.testing.assert_close(together[place], expected, rtol=0, atol=1e-5)


def test_samples_that_are_done_leave_the_batch() -> None:
    process, sizes = process_of(), []
    network = Network(learned_variance=False)

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        sizes.append(len(x_t))
        return network(x_t, timesteps, cond)

    mixed = MixedSampling([SamplingConfig(num_inference_steps=steps) for steps in (3, 1, 5, 3)])
    x_T = streams(4).normal(SHAPE)
    mixed.sample(denoise, x_T, process, streams(4), Labels(LABELS[:4]))
    assert sizes == [4, 3, 3, 1, 1]


@pytest.mark.parametrize("shape", [(5,), (3, 4, 4)])
@pytest.mark.parametrize("config", SAMPLINGS, ids=lambda config: f"{config.sampler} {config.num_inference_steps}")
def test_a_sample_does_not_depend_on_its_batch(config, shape) -> None:
    process = process_of(clip_sample_range=2.0)

    def denoise(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Labels) -> torch.Tensor:
        phase = cond.values + timesteps / 300
        return torch.sin(2 * x_t + phase.reshape(-1, *[1] * len(shape)))

    def sample(rows: list[int]) -> torch.Tensor:
        generator = SampleGenerator.for_samples(3, torch.tensor(rows))
        return config.sample(denoise, generator.normal(shape), process, generator, Labels(LABELS[rows]))

    together = sample([0, 1, 2, 3])
    assert together.shape == (4, *shape)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], sample([i]), rtol=0, atol=1e-6)
    torch.testing.assert_close(sample([2, 0]), together[[2, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(0.7), DPMSolverPP(), DPMSolverPP(stochastic=True)], ids=repr)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_steps_take_each_sample_at_its_own_timestep(sampler, variance_type) -> None:
    """And with its own history: rows one by one are the rows together, exactly."""
    process = process_of(variance_type=variance_type, dynamic_threshold=0.9)
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(4, 6 if variance_type == "learned_range" else 3, 4, 4, generator=generator)
    x_t, noise, last = torch.randn(3, 4, 3, 4, 4, generator=generator)
    state = SamplerState(x_t=x_t, last_x_start=last, last_timesteps=torch.tensor([-1, 800, 21, 5]))
    timesteps, previous = torch.tensor([999, 500, 20, 0]), torch.tensor([700, 499, 3, -1])

    def step(rows: torch.Tensor) -> SamplerState:
        part = state.select(rows)
        return sampler.step(process, output[rows], part, timesteps[rows], previous[rows], noise[rows])

    together = step(torch.arange(4))
    for i in range(4):
        row = torch.tensor([i])
        assert torch.equal(together.select(row).x_t, step(row).x_t)


def test_ddim_takes_a_noise_level_for_each_sample() -> None:
    process = process_of()
    output, x_t, noise = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    t, s, state = torch.tensor([900, 500, 20]), torch.tensor([700, 499, 3]), SamplerState.start(x_t)
    etas = [0.0, 0.4, 1.0]
    together = DDIM(torch.tensor(etas, dtype=torch.float64)).step(process, output, state, t, s, noise)
    for i, eta in enumerate(etas):
        single = DDIM(eta).step(process, output, state, t, s, noise if eta else None)
        torch.testing.assert_close(together.x_t[i], single.x_t[i], rtol=0, atol=0)


def test_an_engine_lets_requests_join_and_leave_between_steps() -> None:
    """By cat and select of states and guided conditions; the late request is still the request alone."""
    process, network = process_of(dynamic_threshold=0.95), Network(learned_variance=False)
    rows = [1, 5]  # dpmsolver++ in 6 steps, sde-dpmsolver++ in 8 steps that starts two steps later
    pairs = [step_pairs(SAMPLINGS[row].timesteps(1000), 1000) for row in rows]
    generators = [SampleGenerator.for_samples(0, torch.tensor([row])) for row in rows]
    states = [SamplerState.start(generator.normal(SHAPE)) for generator in generators]
    conds = [GuidedCondition.of(Labels(LABELS[row : row + 1]), lambda cond: cond) for row in rows]
    state, cond, slots, done, finished = states[0], conds[0], [0], [0, 0], {}
    for tick in range(10):
        if tick == 2:
            state, cond, slots = state.cat(states[1]), cond.cat(conds[1]), [0, 1]
        mixed = MixedSampling([SAMPLINGS[rows[slot]] for slot in slots])
        t, s = torch.tensor([pairs[slot][done[slot]] for slot in slots]).unbind(dim=1)
        output = mixed.guided(network, process, t.device)(state.x_t, t, cond)
        noise = torch.cat([generators[slot].normal(SHAPE) for slot in slots])
        state = mixed.sampler(t.device).step(process, output, state, t, s, noise)
        for slot in slots:
            done[slot] += 1
        staying = [place for place, slot in enumerate(slots) if done[slot] < len(pairs[slot])]
        finished.update({slot: state.x_t[p] for p, slot in enumerate(slots) if done[slot] == len(pairs[slot])})
        kept = torch.tensor(staying, dtype=torch.int64)
        state, cond = state.select(kept), cond.select(kept)
        slots = [slots[place] for place in staying]
    assert not slots
    for slot, row in enumerate(rows):
        torch.testing.assert_close(finished[slot], alone(row, network, process)[0], rtol=0, atol=1e-5)


def test_samples_are_grouped_only_where_the_step_differs() -> None:
    mixed = MixedSampling(SAMPLINGS)
    sampler = mixed.sampler(torch.device("cpu"))
    assert isinstance(sampler, MixedSampler)
    assert [rows.tolist() for _, rows in sampler.parts] == [[0, 3], [1, 7], [2, 4, 6], [5, 8]]
    assert isinstance(mixed.select([4, 2]).sampler(torch.device("cpu")), DDIM)


def test_one_sampling_for_each_sample_is_needed() -> None:
    with pytest.raises(ValueError, match="2 samplings for 3 samples"):
        MixedSampling(SAMPLINGS[:2]).sample(
            Network(learned_variance=False), torch.zeros(3, *SHAPE), process_of(), streams(3), Labels(LABELS[:3])
        )
