"""`images.generate` of the official client: what comes back is what the pipeline draws."""

from __future__ import annotations

import base64
import io
import urllib.request
from dataclasses import replace

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from PIL import Image
from tests.support.serving import RunningApp, picture_of

from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.serving.drawing import orders
from unclip.serving.messages.schemas import GenerationBody

PROMPT = "a red heart"


def drawn(pipeline: Pipeline, seeds: list[int], options: dict | None = None, **told: object) -> dict[int, np.ndarray]:
    draw = pipeline.draw(seeds, options=GenerationOptions.from_dict(options or {}))
    return draw.cascade_of(prompts=[PROMPT] * len(seeds), **told).images


def assert_same(mine: np.ndarray, theirs: np.ndarray) -> None:
    """Float rounding may take a pixel over the border of a level in one stage, and what follows a little further."""
    difference = np.abs(mine.astype(int) - theirs.astype(int))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.01


def test_pictures_are_the_pipelines_with_seeds_from_the_first_on(client: OpenAI, pipeline: Pipeline) -> None:
    answer = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 7})
    expected = pipeline([PROMPT] * 2, seeds=[7, 8]).images[64]
    assert answer.size == "64x64"
    assert answer.output_format == "png"
    assert [picture.seed for picture in answer.data] == [7, 8]
    for mine, theirs in zip(answer.data, expected, strict=True):
        assert_same(picture_of(mine), theirs)


@pytest.mark.parametrize("size", [16, 32])
def test_a_smaller_native_size_is_a_shorter_way(client: OpenAI, pipeline: Pipeline, size: int) -> None:
    answer = client.images.generate(prompt=PROMPT, size=f"{size}x{size}", extra_body={"seed": 3})
    expected = pipeline([PROMPT], seeds=[3], options=GenerationOptions(up_to=size)).images[size][0]
    assert_same(picture_of(answer.data[0]), expected)


def test_a_size_between_is_scaled_down_by_area(client: OpenAI) -> None:
    larger = picture_of(client.images.generate(prompt=PROMPT, size="64x64", extra_body={"seed": 3}).data[0])
    smaller = picture_of(client.images.generate(prompt=PROMPT, size="48x48", extra_body={"seed": 3}).data[0])
    # 4 pixels become 3: the second one is half of the second and half of the third.
    rows = larger.astype(float).reshape(16, 4, 64, 3)
    rows = np.stack(
        [(3 * rows[:, 0] + rows[:, 1]) / 4, (rows[:, 1] + rows[:, 2]) / 2, (rows[:, 2] + 3 * rows[:, 3]) / 4], 1
    )
    both = rows.reshape(48, 16, 4, 3)
    both = np.stack(
        [
            (3 * both[:, :, 0] + both[:, :, 1]) / 4,
            (both[:, :, 1] + both[:, :, 2]) / 2,
            (both[:, :, 2] + 3 * both[:, :, 3]) / 4,
        ],
        2,
    )
    assert smaller.shape == (48, 48, 3)
    assert np.abs(smaller - both.reshape(48, 48, 3)).max() <= 1.01


def test_the_parameters_of_an_answer_draw_it_again(client: OpenAI) -> None:
    body = {"seed": 7, "guidance_scale": 1.5, "num_inference_steps": 4, "negative_prompt": "blue"}
    body |= {"options": {"upsampler_256": {"eta": 0.5}, "prior": {"num_inference_steps": 2}}}
    first = client.images.generate(prompt=PROMPT, n=2, size="32x32", output_format="png", extra_body=body).data[1]
    parameters = dict(first.parameters)
    assert parameters["n"] == 1
    again = client.images.generate(prompt=parameters.pop("prompt"), extra_body=parameters).data[0]
    assert again.b64_json is not None
    assert_same(picture_of(again), picture_of(first))
    assert again.parameters == first.parameters
    plain = client.images.generate(prompt=PROMPT, size="32x32", extra_body={"seed": first.seed}).data[0]
    assert not np.array_equal(picture_of(plain), picture_of(first))


def test_parameters_say_also_what_only_this_server_does_otherwise(app: RunningApp) -> None:
    options = GenerationOptions.from_dict({"decoder": {"guidance_scale": 5.0}})
    model = replace(app.service.models.current, options=options)
    body = GenerationBody.from_dict({"prompt": PROMPT, "options": {"decoder": {"guidance_scale": None}}})
    order = orders.generation(body, model, app.service.config.limits)
    again = GenerationBody.from_dict(order.repeats(0))
    same = orders.generation(again, model, app.service.config.limits)
    plain = orders.generation(GenerationBody(prompt=PROMPT, seed=again.seed), model, app.service.config.limits)
    assert same.requests[0].options == order.requests[0].options
    assert plain.requests[0].options != order.requests[0].options


def test_without_a_seed_every_request_is_another_picture_that_can_be_drawn_again(client: OpenAI) -> None:
    first, second = (client.images.generate(prompt=PROMPT, size="16x16").data[0] for _ in range(2))
    assert first.seed != second.seed
    again = client.images.generate(prompt=PROMPT, extra_body={**first.parameters}).data[0]
    assert np.array_equal(picture_of(again), picture_of(first))


def test_guidance_and_steps_are_the_decoders(client: OpenAI, pipeline: Pipeline) -> None:
    body = {"seed": 5, "guidance_scale": 3.0, "num_inference_steps": 5}
    answer = client.images.generate(prompt=PROMPT, size="16x16", extra_body=body)
    options = GenerationOptions.from_dict({"up_to": 16, "decoder": {"guidance_scale": 3.0, "num_inference_steps": 5}})
    assert_same(picture_of(answer.data[0]), pipeline([PROMPT], seeds=[5], options=options).images[16][0])


def test_what_the_decoder_is_told_can_be_chosen(client: OpenAI, pipeline: Pipeline) -> None:
    z_t = pipeline.encode_text([PROMPT])
    expected = {
        "text_embedding": drawn(pipeline, [5], {"up_to": 16}, image_embed=z_t),
        "none": drawn(pipeline, [5], {"up_to": 16}),
    }
    for prior, theirs in expected.items():
        answer = client.images.generate(prompt=PROMPT, size="16x16", extra_body={"seed": 5, "prior": prior})
        assert_same(picture_of(answer.data[0]), theirs[16][0])
        assert answer.data[0].parameters["prior"] == prior


@pytest.mark.parametrize("is_base64", [False, True])
def test_an_embedding_that_comes_out_goes_in_again(client: OpenAI, is_base64: bool) -> None:
    first = client.images.generate(
        prompt=PROMPT, size="16x16", extra_body={"seed": 5, "include": ["image_embed"]}
    ).data[0]
    embed = first.image_embed
    assert len(embed) == 8
    assert torch.tensor(embed).norm() == pytest.approx(1, abs=1e-4)
    sent = base64.b64encode(np.array(embed, "<f4").tobytes()).decode() if is_base64 else embed
    again = client.images.generate(prompt=PROMPT, size="16x16", extra_body={"seed": 5, "image_embed": sent}).data[0]
    assert_same(picture_of(again), picture_of(first))
    repeated = client.images.generate(prompt=PROMPT, extra_body=again.parameters).data[0]
    assert np.array_equal(picture_of(repeated), picture_of(again))
    turned = np.roll(np.array(embed), 1).tolist()
    other = client.images.generate(prompt=PROMPT, size="16x16", extra_body={"seed": 5, "image_embed": turned}).data[0]
    assert not np.array_equal(picture_of(other), picture_of(first))


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_pictures_come_in_the_format_that_was_asked_for(client: OpenAI, form: str) -> None:
    answer = client.images.generate(prompt=PROMPT, size="32x32", output_format=form, extra_body={"seed": 3})
    content = base64.b64decode(answer.data[0].b64_json)
    image = Image.open(io.BytesIO(content))
    assert answer.output_format == form
    assert image.format == form.upper()
    assert image.size == (32, 32)


def test_compression_makes_files_smaller(client: OpenAI) -> None:
    sizes = []
    for compression in (100, 10):
        answer = client.images.generate(
            prompt=PROMPT, output_format="jpeg", output_compression=compression, extra_body={"seed": 3}
        )
        sizes.append(len(answer.data[0].b64_json))
    assert sizes[1] < sizes[0]


def test_pictures_say_where_they_come_from(client: OpenAI) -> None:
    answer = client.images.generate(prompt=PROMPT, n=2, size="16x16", extra_body={"seed": 3})
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[1].b64_json)))
    assert image.info["Seed"] == "4"
    assert image.info["Revision"] == answer.revision
    assert image.info["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert PROMPT not in str(image.info)


def test_pictures_by_address_are_the_same(app: RunningApp, client: OpenAI) -> None:
    body = {"prompt": PROMPT, "size": "16x16", "extra_body": {"seed": 3}}
    by_address = client.images.generate(response_format="url", **body).data[0]
    assert by_address.b64_json is None
    assert by_address.url.startswith(app.url + "/v1/pictures/")
    with urllib.request.urlopen(by_address.url) as answer:
        content = answer.read()
        assert answer.headers["content-type"] == "image/png"
        assert "max-age" in answer.headers["cache-control"]
    expected = picture_of(client.images.generate(response_format="b64_json", **body).data[0])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), expected)


def test_what_openai_has_beside_is_accepted(client: OpenAI) -> None:
    answer = client.images.generate(
        prompt=PROMPT,
        model="dall-e-2",
        size="auto",
        background="opaque",
        quality="high",
        style="vivid",
        moderation="low",
        user="somebody",
        n=None,
    )
    assert answer.background == "opaque"
    assert answer.size == "64x64"


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"size": "128x128"}, "size", "invalid_size"),
        ({"size": "64x32"}, "size", "invalid_size"),
        ({"size": "large"}, "size", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": 2 * 4000 * "a"}, "prompt", "invalid_value"),
        ({"extra_body": {"seeds": 3}}, "seeds", "unknown_parameter"),
        ({"extra_body": {"seed": "3"}}, "seed", "invalid_value"),
        ({"extra_body": {"seed": -1}}, "seed", "invalid_value"),
        ({"extra_body": {"num_inference_steps": 61}}, "num_inference_steps", "invalid_value"),
        (
            {"extra_body": {"num_inference_steps": 50, "options": {"decoder": {"sampler": "nine"}}}},
            "options.decoder.sampler",
            "invalid_value",
        ),
        ({"extra_body": {"guidance_scale": 1e30}}, "guidance_scale", "invalid_value"),
        (
            {"extra_body": {"options": {"prior": {"guidance_scale": 1e30}}}},
            "options.prior.guidance_scale",
            "invalid_value",
        ),
        ({"extra_body": {"options": {"up_to": 16}}}, "options.up_to", "invalid_value"),
        ({"extra_body": {"options": {"prior": {"eta": 0.5}}}}, "options.prior", "invalid_value"),
        ({"extra_body": {"options": {"prior": {"temperatur": 0.5}}}}, "options.prior.temperatur", "unknown_parameter"),
        ({"extra_body": {"image_embed": [1.0, 0.0]}}, "image_embed", "invalid_value"),
        ({"extra_body": {"image_embed": [2.0] * 8}}, "image_embed", "invalid_value"),
        ({"extra_body": {"image_embed": "no base64"}}, "image_embed", "invalid_value"),
        ({"extra_body": {"timeout_s": 1000}}, "timeout_s", "invalid_value"),
        ({"extra_body": {"partial_images": 2}}, "stream", None),
    ],
)
def test_what_the_model_cannot_do_names_its_field(client: OpenAI, changes: dict, param: str, code: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": PROMPT, **changes})
    assert caught.value.param == param
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id.startswith("req-")
