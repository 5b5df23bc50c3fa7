"""Features are the networks' own, of pictures resized as the protocol says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.unit.evaluation.conftest import png

from unclip.config.base import ConfigError
from unclip.evaluation.extractors import ClipExtractor, InceptionExtractor, central_square, extract_all
from unclip.evaluation.inception import InceptionFeatures
from unclip.models.clip import ClipModel

PICTURES = [np.asarray(Image.open(io.BytesIO(png(number, size)))) for number, size in enumerate([(24, 20), (16, 16)])]
CAPTIONS = ["a red heart", "a blue house"]


def test_clips_features_are_its_embeddings(clip: ClipModel, clip_source: str) -> None:
    extractor = ClipExtractor(clip_source, clip)
    extractor.setup("cpu")
    inputs = extractor.prepare([*PICTURES, PICTURES[0]], [*CAPTIONS, None])
    features = extract_all([extractor], inputs, microbatch=2)
    for row, picture in enumerate(PICTURES):
        side = min(picture.shape[:2])
        left, top = ((picture.shape[axis] - side) // 2 for axis in (1, 0))
        square = Image.fromarray(picture[top : top + side, left : left + side]).resize(
            (16, 16), Image.Resampling.BICUBIC
        )
        expected = clip.encode_image(np.asarray(square)[np.newaxis])[0]
        np.testing.assert_allclose(features["clip"][row], expected, atol=1e-6)
        np.testing.assert_allclose(
            features["clip_text"][row], clip.encode_text(clip.tokenize([CAPTIONS[row]]))[0], atol=1e-6
        )
    assert features["clip"].dtype == np.float32
    np.testing.assert_allclose(features["clip"][2], features["clip"][0], atol=1e-6)


def test_a_fine_pattern_becomes_grey_and_not_another_pattern() -> None:
    """Resizing without a filter would keep single pixels of it."""
    checks = np.indices((256, 256)).sum(axis=0) % 2 * 255
    small = central_square(np.repeat(checks[..., np.newaxis], 3, axis=2).astype(np.uint8), 30)
    assert np.abs(small.astype(int) - 127).max() <= 2


def test_inceptions_features_are_those_before_its_classes(inception: InceptionFeatures, inception_weights: str) -> None:
    extractor = InceptionExtractor(inception_weights)
    extractor.setup("cpu")
    found = extractor.extract(extractor.prepare(PICTURES, CAPTIONS))
    features = found["inception"]
    assert (features.shape, features.dtype) == ((2, 2048), np.float32)
    assert np.abs(features[0] - features[1]).max() > 0.1
    pixels = torch.tensor(central_square(PICTURES[1], 299)).permute(2, 0, 1)[np.newaxis]
    logits = inception.network((pixels.float() - 128) / 128)
    np.testing.assert_allclose(inception.network.fc(torch.tensor(features[1:])), logits, atol=1e-4)
    assert found["inception_logits"].shape == (2, 1008)
    np.testing.assert_allclose(found["inception_logits"][1:] + inception.network.fc.bias.numpy(), logits, atol=1e-4)


def test_inceptions_means_leave_the_padding_out(inception: InceptionFeatures) -> None:
    """And its last block takes the greatest value."""
    network = inception.network
    with torch.no_grad():
        for block, width in ((network.Mixed_5b, 192), (network.Mixed_6c, 768), (network.Mixed_7b, 1280)):
            x = torch.rand(1, width, 4, 4)
            branch = block.branch_pool(pooled(x, torch.mean))
            torch.testing.assert_close(block(x)[:, -branch.shape[1] :], branch)
        x = torch.rand(1, 2048, 4, 4)
        torch.testing.assert_close(network.Mixed_7c(x)[:, -192:], network.Mixed_7c.branch_pool(pooled(x, torch.amax)))


def pooled(x: torch.Tensor, reduce: object) -> torch.Tensor:
    """Over each position's neighbours inside the picture, one position after the other."""
    result = torch.empty_like(x)
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            around = x[:, :, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            result[:, :, row, column] = reduce(around, dim=(2, 3))
    return result


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"inception = .*: there is no such file"):
        InceptionExtractor(str(tmp_path / "nowhere"))
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="not the weights of FID's Inception network"):
        InceptionExtractor(str(tmp_path / "other.safetensors"))
