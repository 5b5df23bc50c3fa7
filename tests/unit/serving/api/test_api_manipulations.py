"""Edits, variations, interpolations, text diffs: what the pipelines' functions draw, through the API."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
from tests.support.serving import RunningApp, decoded, picture_of, png_of

from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.manipulations.inpainting import inpainting
from unclip.pipelines.manipulations.interpolation import interpolation
from unclip.pipelines.manipulations.text_diff import text_diff, thetas
from unclip.pipelines.pipeline import Pipeline
from unclip.serving.drawing import manipulations
from unclip.serving.messages.schemas import TextDiffBody

PROMPT = "a red heart"
KEEP = np.ones((64, 64), bool)
KEEP[8:40, 16:56] = False


def painting(seed: int, side: int = 64) -> np.ndarray:
    """Smooth colours, so that nothing depends on single pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))


def assert_same(mine: np.ndarray, theirs: np.ndarray) -> None:
    """Float rounding may take a pixel over the border of a level in one stage, and what follows a little further."""
    difference = np.abs(mine.astype(int) - theirs.astype(int))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.01


def posted(app: RunningApp, path: str, files: list[tuple[str, bytes]], **fields: object) -> dict:
    """The answer to a form."""
    sent = [(field, ("a.png", content, "image/png")) for field, content in files]
    data = {name: str(value) for name, value in fields.items()}
    answer = httpx.post(f"{app.url}/v1/images/{path}", files=sent, data=data, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pictures_of(answer: dict) -> list[np.ndarray]:
    return [decoded(base64.b64decode(picture["b64_json"])) for picture in answer["data"]]


def test_edits_are_inpainting(client: OpenAI, pipeline: Pipeline) -> None:
    picture = painting(1)
    answer = client.images.edit(
        image=("a.png", png_of(picture)),
        mask=("m.png", png_of(picture, KEEP)),
        prompt=PROMPT,
        n=2,
        extra_body={"seed": 5},
    )
    expected = inpainting(pipeline, picture, KEEP, PROMPT, [5, 6]).images[64]
    for mine, theirs in zip(answer.data, expected, strict=True):
        assert_same(picture_of(mine), theirs)
        assert np.array_equal(picture_of(mine)[KEEP], picture[KEEP])


def test_a_picture_may_be_its_own_mask(client: OpenAI) -> None:
    picture = painting(1)
    both = client.images.edit(
        image=("a.png", png_of(picture)), mask=("m.png", png_of(picture, KEEP)), prompt=PROMPT, extra_body={"seed": 5}
    )
    own = client.images.edit(image=[("a.png", png_of(picture, KEEP))], prompt=PROMPT, extra_body={"seed": 5})
    inside = picture_of(own.data[0])[~KEEP]
    assert np.array_equal(inside, picture_of(both.data[0])[~KEEP])


def test_edits_of_other_shapes_are_of_the_middle_square(client: OpenAI) -> None:
    picture, keep = np.asarray(Image.fromarray(painting(2)).resize((256, 128))), np.ones((128, 256), bool)
    keep[:, :128] = False
    answer = client.images.edit(image=("a.png", png_of(picture, keep)), prompt=PROMPT)
    made = picture_of(answer.data[0])
    middle = np.asarray(Image.fromarray(picture[:, 64:192]).reduce(2)).astype(int)
    assert made.shape == (64, 64, 3)
    assert np.abs(made[:, 34:] - middle[:, 34:]).max() <= 4


def test_edits_say_that_parts_are_not_generated(client: OpenAI) -> None:
    answer = client.images.edit(image=("a.png", png_of(painting(1), KEEP)), prompt=PROMPT)
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert image.info["DigitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")


def test_the_parameters_of_an_edit_draw_it_again(client: OpenAI) -> None:
    image = ("a.png", png_of(painting(1), KEEP))
    body = {
        "guidance_scale": 1.5,
        "options": {"upsampler_256": {"timesteps_list": [40, 20]}},
        "include": ["image_embed"],
    }
    first = client.images.edit(image=image, prompt=PROMPT, size="32x32", extra_body=body).data[0]
    assert len(first.image_embed) == 8
    parameters = dict(first.parameters)
    again = client.images.edit(image=image, prompt=parameters.pop("prompt"), extra_body=parameters).data[0]
    assert_same(picture_of(again), picture_of(first))


@pytest.mark.parametrize("mask", [None, png_of(painting(1), np.ones((64, 64), bool)), png_of(painting(1, 32))])
def test_edits_need_a_mask_of_the_picture_with_something_to_draw(client: OpenAI, mask: bytes | None) -> None:
    masks = {} if mask is None else {"mask": ("m.png", mask)}
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=("a.png", png_of(painting(1))), prompt=PROMPT, **masks)
    assert caught.value.param == "mask"


def test_variations_have_the_pictures_embedding_and_new_noise(client: OpenAI, pipeline: Pipeline) -> None:
    picture = painting(3)
    image = ("a.png", png_of(picture))
    answer = client.images.create_variation(image=image, n=2, size="64x64", extra_body={"seed": 5})
    embeds = pipeline.encode_image(picture[None]).expand(2, -1)
    expected = pipeline.draw([5, 6]).cascade_of(image_embed=embeds).images[64]
    for mine, theirs in zip(answer.data, expected, strict=True):
        assert_same(picture_of(mine), theirs)


@pytest.mark.parametrize("noise", ["interpolated", "shared"])
def test_interpolations_are_those_of_the_pipeline(app: RunningApp, pipeline: Pipeline, noise: str) -> None:
    pictures = [painting(seed) for seed in (1, 2, 3)]
    files = [(field, png_of(picture)) for field, picture in zip(("image[]",) * 3, pictures, strict=True)]
    answer = posted(app, "interpolations", files, frames=3, noise=noise, seed=5, size="32x32", num_inference_steps=8)
    options = GenerationOptions.from_dict({"up_to": 32, "decoder": {"num_inference_steps": 8}})
    expected = interpolation(pipeline, np.stack(pictures), frames=3, noise=noise, seed=5, options=options).images[32]
    assert [picture["share"] for picture in answer["data"]] == [0, 0.5, 1, 1.5, 2]
    for mine, theirs in zip(pictures_of(answer), expected, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("source", ["a photo", ""])
def test_text_diffs_are_those_of_the_pipeline(app: RunningApp, pipeline: Pipeline, source: str) -> None:
    picture = painting(1)
    fields = {"prompt": PROMPT, "source_prompt": source, "frames": 3, "max_theta": 0.4, "seed": 5, "size": "16x16"}
    answer = posted(app, "text-diffs", [("image", png_of(picture))], **fields, num_inference_steps=8)
    options = GenerationOptions.from_dict({"up_to": 16, "decoder": {"num_inference_steps": 8}})
    expected = text_diff(
        pipeline, picture[None], PROMPT, source=source or None, path=thetas(3, 0.4), seed=5, options=options
    ).images[16]
    assert [picture["theta"] for picture in answer["data"]] == [0, 0.2, 0.4]
    for mine, theirs in zip(pictures_of(answer), expected, strict=True):
        assert_same(mine, theirs)


def test_ways_can_be_drawn_again(app: RunningApp) -> None:
    files = [("image", png_of(painting(1)))]
    first = posted(app, "text-diffs", files, prompt=PROMPT, frames=2, max_theta=0.3, seed=5, size="16x16")
    again = posted(app, "text-diffs", files, **first["data"][1]["parameters"])
    for mine, theirs in zip(pictures_of(again), pictures_of(first), strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize(("source", "texts"), [(None, (PROMPT, "a photo")), ("", (PROMPT,)), ("b", (PROMPT, "b"))])
def test_no_source_prompt_is_the_usual_one(app: RunningApp, source: str | None, texts: tuple[str, ...]) -> None:
    body = TextDiffBody(prompt=PROMPT, source_prompt=source)
    order = manipulations.text_diff(body, b"", app.service.models.current, app.service.config.limits)
    assert order.texts == texts


@pytest.mark.parametrize(
    ("path", "files", "fields", "param"),
    [
        ("interpolations", 1, {}, "image"),
        ("interpolations", 3, {"frames": 6}, "frames"),
        ("interpolations", 2, {"frames": 1}, "frames"),
        ("interpolations", 2, {"noise": "none"}, "noise"),
        ("interpolations", 2, {"options[decoder][sampler]": "ddpm"}, "options.decoder.sampler"),
        ("interpolations", 2, {"options[decoder][eta]": "1"}, "options.decoder.eta"),
        ("text-diffs", 1, {"prompt": PROMPT, "source_prompt": PROMPT}, "prompt"),
        ("text-diffs", 1, {}, "prompt"),
        ("text-diffs", 2, {"prompt": PROMPT}, "image"),
        ("text-diffs", 1, {"prompt": PROMPT, "max_theta": 2}, "max_theta"),
        ("variations", 0, {}, "image"),
        ("variations", 1, {"prompt": PROMPT}, "prompt"),
        ("variations", 1, {"image": "text"}, "image"),
        ("variations", 1, {"seed": "1", "seed[]": "2"}, "seed"),
        ("variations", 1, {"options[decoder]": "1", "options[decoder][eta]": "2"}, "options"),
        ("edits", 1, {"prompt": PROMPT, "n": "one"}, "n"),
    ],
)
def test_forms_that_mean_nothing_name_their_field(
    app: RunningApp, path: str, files: int, fields: dict, param: str
) -> None:
    sent = [("image", ("a.png", png_of(painting(index)), "image/png")) for index in range(files)]
    answer = httpx.post(f"{app.url}/v1/images/{path}", files=sent or {"nothing": b""}, data=fields)
    assert answer.status_code == 400
    if files:
        assert answer.json()["error"]["param"] == param


def test_files_that_are_no_pictures_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.create_variation(image=("a.png", b"no picture"))
    assert (caught.value.param, caught.value.code) == ("image", "invalid_image")
