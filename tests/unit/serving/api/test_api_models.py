"""Models and embeddings, as the official client asks for them."""

from __future__ import annotations

import base64
import struct

import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from tests.support.serving import RunningApp, png_of

from unclip.pipelines.pipeline import Pipeline


def test_the_model_says_what_can_be_asked_of_it(app: RunningApp, client: OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "unclip"
    assert model.sizes == [16, 32, 64]
    assert list(model.stages) == ["prior", "decoder", "upsampler_256", "upsampler_1024"]
    assert model.stages["decoder"] == {"num_inference_steps": 3, "guidance_scale": 2.0, "size": 16}
    assert (model.embed_dim, model.clip_image_size) == (8, 16)
    assert model.limits["steps"] == 60
    assert model.revision == app.service.models.current.digest
    for name in ("unclip", "dall-e-2"):
        assert client.models.retrieve(name) == model


def test_texts_are_embedded_as_the_pipeline_does(client: OpenAI, pipeline: Pipeline) -> None:
    texts = ["a red heart", "a blue heart"]
    answer = client.embeddings.create(model="unclip", input=texts)
    assert [one.index for one in answer.data] == [0, 1]
    found = torch.tensor([one.embedding for one in answer.data])
    torch.testing.assert_close(found, pipeline.encode_text(texts).cpu(), atol=1e-5, rtol=0)
    [plain] = client.embeddings.create(model="unclip", input=texts[0], encoding_format="float").data
    torch.testing.assert_close(torch.tensor(plain.embedding), found[0], atol=1e-5, rtol=0)


def test_pictures_follow_texts(client: OpenAI, pipeline: Pipeline) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    sent = {"images": [base64.b64encode(png_of(picture)).decode()]}
    answer = client.embeddings.create(model="unclip", input="a red heart", encoding_format="float", extra_body=sent)
    found = torch.tensor([one.embedding for one in answer.data])
    expected = torch.cat([pipeline.encode_text(["a red heart"]), pipeline.encode_image(picture[None])]).cpu()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_embeddings_as_base64_are_little_endian_floats(client: OpenAI) -> None:
    raw = client.embeddings.with_raw_response.create(model="unclip", input="a", encoding_format="base64")
    [one] = raw.http_response.json()["data"]
    [numbers] = [list(struct.unpack("<8f", base64.b64decode(one["embedding"])))]
    [plain] = client.embeddings.create(model="unclip", input="a", encoding_format="float").data
    assert numbers == pytest.approx(plain.embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 257}, "input"),
        ({"input": ["a" * 2000] * 17}, "input"),
        ({"input": "a", "extra_body": {"images": ["no base64"]}}, "images.0"),
        ({"input": "a", "dimensions": 4}, "dimensions"),
    ],
)
def test_what_cannot_be_embedded_names_its_field(client: OpenAI, body: dict, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="unclip", **body)
    assert caught.value.param == param
