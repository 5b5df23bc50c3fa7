"""Each manipulation against what it must be at its ends, and against the same asked for alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from unclip.config.base import ConfigError
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.inversion import deterministic, invert
from unclip.pipelines.manipulations.interpolation import interpolation
from unclip.pipelines.manipulations.prior_ablation import prior_ablation
from unclip.pipelines.manipulations.probing import partial_embeds, probing
from unclip.pipelines.manipulations.sphere import slerp
from unclip.pipelines.manipulations.text_diff import direction, text_diff, thetas
from unclip.pipelines.manipulations.variations import variations
from unclip.pipelines.pictures import at_size
from unclip.pipelines.pipeline import Pipeline
from unclip.utils.random import SampleGenerator

OPTIONS = GenerationOptions().merged({"up_to": 16, "decoder": {"num_inference_steps": 80, "guidance_scale": 1.0}})


def unit(seed: int, count: int = 4, dim: int = 8) -> torch.Tensor:
    return functional.normalize(SampleGenerator.for_samples(seed, torch.arange(count)).normal((dim,)), dim=1)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_slerp_turns_by_the_share_of_the_angle() -> None:
    a, b = unit(1).double(), unit(2).double()
    angle = (a * b).sum(dim=1).acos()
    for value in (0.0, 0.25, 0.5, 1.0):
        found = slerp(a, b, torch.full((4,), value))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(4).double())
        torch.testing.assert_close((found * a).sum(dim=1), (value * angle).cos())
        torch.testing.assert_close((found * b).sum(dim=1), ((1 - value) * angle).cos())


def test_slerp_is_of_whole_vectors_and_exact_at_the_ends() -> None:
    """A share for each row; of noise the angle is that of the whole tensor, whatever its shape."""
    a, b = (SampleGenerator.for_samples(seed, torch.arange(3)).normal((3, 4, 4)) for seed in (1, 2))
    share = torch.tensor([0.0, 0.4, 1.0])
    found = slerp(a, b, share)
    assert torch.equal(found[0], a[0])
    assert torch.equal(found[2], b[2])
    torch.testing.assert_close(found[1].flatten(), slerp(a[1].view(1, -1), b[1].view(1, -1), share[1:2])[0])
    per_element = slerp(a[1].view(-1, 1), (b[1] * (a[1] * b[1]).sign()).view(-1, 1), torch.full((48,), 0.4)).flatten()
    assert (found[1].flatten() - per_element).abs().max() > 0.1


def test_slerp_between_equals_stays_and_between_opposites_is_refused() -> None:
    a = unit(1)
    torch.testing.assert_close(slerp(a, a, torch.full((4,), 0.3)), a)
    with pytest.raises(ValueError, match="opposite"):
        slerp(a, -a, torch.full((4,), 0.3))


def test_variations_without_noise_are_the_picture_and_with_noise_keep_its_z_i(
    exact_pipeline: Pipeline, drawings: np.ndarray
) -> None:
    small = at_size(torch.from_numpy(drawings), 16).numpy()
    still = variations(exact_pipeline, drawings, [1, 2], eta=0.0, options=OPTIONS)
    assert still.images[16].shape == (6, 16, 16, 3)
    for row in range(6):
        assert np.abs(still.images[16][row].astype(int) - small[row // 2].astype(int)).mean() < 3
    moved = variations(exact_pipeline, drawings, [1, 2], eta=1.0, options=OPTIONS)
    assert difference(moved.images[16][0], moved.images[16][1]) > 20
    torch.testing.assert_close(moved.image_embed[2], exact_pipeline.encode_image(drawings)[1])
    # What z_i holds of a picture is, for this decoder, the means of the channels.
    means = 0.3 * exact_pipeline.decoder._normalizer.normalize(moved.image_embed)[:, :3]
    found = moved.images[16].mean(axis=(1, 2)) / 127.5 - 1
    np.testing.assert_allclose(found, means.numpy().clip(-0.9, 0.9), atol=0.15)


def test_variations_of_one_picture_are_the_same_beside_others(exact_pipeline: Pipeline, drawings: np.ndarray) -> None:
    together = variations(exact_pipeline, drawings, [1, 2], options=OPTIONS)
    alone = variations(exact_pipeline, drawings[1:2], [2], options=OPTIONS)
    assert difference(alone.images[16][0], together.images[16][3]) <= 1


def test_interpolation_begins_and_ends_at_the_reconstructions(exact_pipeline: Pipeline, drawings: np.ndarray) -> None:
    found = interpolation(exact_pipeline, drawings, frames=4, options=OPTIONS)
    assert len(found.images[16]) == 2 * 3 + 1
    back = variations(exact_pipeline, drawings, [0], eta=0.0, options=OPTIONS)
    for place, picture in ((0, 0), (3, 1), (6, 2)):
        assert difference(found.images[16][place], back.images[16][picture]) <= 1
        torch.testing.assert_close(found.image_embed[place], back.image_embed[picture])
    angles = (found.image_embed[1:] * found.image_embed[:-1]).sum(dim=1).clamp(max=1).acos()
    torch.testing.assert_close(angles[:3], angles[:1].expand(3), rtol=1e-3, atol=1e-4)


def test_interpolation_from_shared_noise_changes_z_i_alone(exact_pipeline: Pipeline, drawings: np.ndarray) -> None:
    found = interpolation(exact_pipeline, drawings[:2], frames=3, noise="shared", seed=5, options=OPTIONS)
    draw = exact_pipeline.draw([5], options=deterministic(OPTIONS))
    for frame in range(3):
        alone = draw.decode(image_embed=found.image_embed[frame : frame + 1])
        assert difference(alone[0].numpy(), found.images[16][frame]) <= 1
    with pytest.raises(ValueError, match="1 pictures, frames = 7: a way needs at least 2"):
        interpolation(exact_pipeline, drawings[:1])


def test_only_what_is_used_is_inverted(exact_pipeline: Pipeline, drawings: np.ndarray) -> None:
    """One call of the decoder a step: an inversion takes as many as the drawing."""
    options, calls = OPTIONS.merged({"decoder": {"num_inference_steps": 5}}), [0]
    hook = exact_pipeline.decoder.network.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    try:
        interpolation(exact_pipeline, drawings, frames=2, noise="shared", options=options)
        assert calls == [5]
        interpolation(exact_pipeline, drawings, frames=2, noise="interpolated", options=options)
        assert calls == [5 + 10]
    finally:
        hook.remove()


def test_text_diffs_turn_z_i_by_theta_and_begin_at_the_picture(exact_pipeline: Pipeline, drawings: np.ndarray) -> None:
    path = [0.0, 0.2, 0.5]
    found = text_diff(exact_pipeline, drawings[:2], "a red heart", source="a photo", path=path, options=OPTIONS)
    back = variations(exact_pipeline, drawings[:2], [0], eta=0.0, options=OPTIONS)
    for picture in (0, 1):
        assert difference(found.images[16][3 * picture], back.images[16][picture]) == 0
    z_t, z_0 = exact_pipeline.encode_text(["a red heart"]), exact_pipeline.encode_text(["a photo"])
    z_d = functional.normalize(z_t - z_0, dim=1)
    angles = (found.image_embed @ z_d[0]).acos().view(2, 3)
    torch.testing.assert_close(angles, angles[:, :1] * (1 - torch.tensor(path)), rtol=1e-3, atol=1e-3)
    assert difference(found.images[16][0], found.images[16][2]) > 5


def test_directions_without_source_and_without_difference(exact_pipeline: Pipeline) -> None:
    torch.testing.assert_close(direction(exact_pipeline, "a cat", None), exact_pipeline.encode_text(["a cat"]))
    with pytest.raises(ConfigError, match="target = 'a cat': means the same to CLIP as the source caption, 'a cat'"):
        direction(exact_pipeline, "a cat", "a cat")
    assert thetas(5, 0.5) == [0, 0.125, 0.25, 0.375, 0.5]


def basis(dim: int = 8) -> torch.Tensor:
    return torch.linalg.qr(SampleGenerator.for_samples(3, torch.arange(dim)).normal((dim,)).double())[0]


def test_all_components_are_z_i_and_fewer_are_its_projection() -> None:
    z, mean, components = unit(1), 0.1 * unit(2, 1)[0], basis()
    found = partial_embeds(z, mean, components, [0, 3, 8])
    torch.testing.assert_close(found[2::3], z)
    torch.testing.assert_close(found[0::3], functional.normalize(mean, dim=0).expand(4, -1))
    # By least squares: no other point of the affine space of three components is nearer.
    directions = components[:3].T
    scores = torch.linalg.lstsq(directions, (z.double() - mean.double()).T).solution
    nearest = functional.normalize(mean.double() + (directions @ scores).T, dim=1)
    torch.testing.assert_close(found[1::3].double(), nearest, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="9 components: there are 8"):
        partial_embeds(z, mean, components, [9])


def test_probing_draws_all_counts_from_one_noise(exact_pipeline: Pipeline, drawings: np.ndarray) -> None:
    z = exact_pipeline.encode_image(drawings)
    found = probing(exact_pipeline, z, mean=torch.zeros(8), components=basis(), counts=[2, 8], seed=4, options=OPTIONS)
    whole = exact_pipeline.draw([4] * 3, options=deterministic(OPTIONS)).decode(image_embed=z)
    assert difference(found.images[16][1::2], whole.numpy()) <= 1
    assert difference(found.images[16][0::2], whole.numpy()) > 2


def test_ablation_tells_the_decoder_what_it_says(tiny_pipeline: Pipeline) -> None:
    """Each row is the picture of just that condition, from the same noise."""
    prompts, seeds = ["a red circle", "a blue heart"], [7, 8]
    options = GenerationOptions().merged({"up_to": 16})
    found = prior_ablation(tiny_pipeline, prompts, seeds, options=options)
    assert list(found) == ["caption only", "text embedding", "prior"]
    whole = tiny_pipeline(prompts, seeds, options=options)
    draw = tiny_pipeline.draw(seeds, options=options)
    z_t = tiny_pipeline.encode_text(prompts)
    np.testing.assert_array_equal(found["prior"].images[16], whole.images[16])
    np.testing.assert_array_equal(
        found["text embedding"].images[16], draw.decode(prompts=prompts, image_embed=z_t).numpy()
    )
    np.testing.assert_array_equal(found["caption only"].images[16], draw.decode(prompts=prompts).numpy())
    assert found["caption only"].image_embed is None
    torch.testing.assert_close(found["text embedding"].image_embed, z_t)
    images = [output.images[16] for output in found.values()]
    assert min(difference(images[0], images[1]), difference(images[1], images[2])) > 0


def test_latents_are_those_of_clip(exact_pipeline: Pipeline, drawings: np.ndarray) -> None:
    latents = invert(exact_pipeline, drawings, options=OPTIONS)
    torch.testing.assert_close(latents.image_embed, exact_pipeline.clip.encode_image(drawings))
