"""The Inception network of FID (Heusel et al. 2017): torchvision's architecture with the pooling of TensorFlow's 2015 graph.

Weights are a safetensors file with torchvision's names and 1008 classes, as the port that the field uses has them
(`pt_inception-2015-12-05-6726825d.pth`, which is a pickle: `torch.load(…, weights_only=True)` and `save_file` turn it into
safetensors).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torchvision.models import inception_v3

from unclip.evaluation.weights import check_weights, load_weights

_CLASSES = 1008
_FIELD, _WHAT = "inception", "FID's Inception network"
_WITHOUT_PADDING = (
    "Mixed_5b",
    "Mixed_5c",
    "Mixed_5d",
    "Mixed_6b",
    "Mixed_6c",
    "Mixed_6d",
    "Mixed_6e",
    "Mixed_7b",
)
"""Blocks whose average pooling does not count the padding."""


class InceptionFeatures(nn.Module):
    """(B, 299, 299, 3) uint8 -> (B, 2048) features after the last pooling and (B, 1008) logits of its classes, float32.

    The logits are without the bias of the last layer: the graph that the field's Inception Scores come from leaves it out,
    and torch-fidelity with it (its `logits_unbiased`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = inception_v3(
            weights=None, num_classes=_CLASSES, aux_logits=False, transform_input=False, init_weights=False
        )
        mean = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        for name in _WITHOUT_PADDING:
            _pool_by(self.network.get_submodule(name), mean)
        # Not what the paper of the network says; but the graph that FID is defined by does it.
        _pool_by(self.network.Mixed_7c, partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.network.Conv2d_1a_3x3.conv.weight
        pixels = images.to(weight.device).permute(0, 3, 1, 2).to(weight.dtype)
        pooled: list[torch.Tensor] = []
        hook = self.network.avgpool.register_forward_hook(lambda _, __, output: pooled.append(output))
        try:
            self.network((pixels - 128) / 128)
        finally:
            hook.remove()
        features = pooled[0].flatten(1)
        return features, features @ self.network.fc.weight.T


def check_inception(weights: str) -> str:
    """The hash of a safetensors file with its weights; `ConfigError` where there is none, or it is another network's."""
    return check_weights(_FIELD, weights, lambda: InceptionFeatures().network, _WHAT)


def load_inception(weights: str, sha256: str, device: str = "cpu") -> InceptionFeatures:
    """The network with the weights of a file of this hash; `ConfigError` where it is another file now."""
    model = InceptionFeatures()
    load_weights(_FIELD, weights, sha256, model.network, _WHAT)
    return model.to(device).eval().requires_grad_(False)


def _pool_by(block: nn.Module, pool: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes the pooling of a block's last branch."""
    branches: Callable[[torch.Tensor], list[torch.Tensor]] = block._forward  # type: ignore[assignment]

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        return [*branches(x)[:-1], block.get_submodule("branch_pool")(pool(x))]

    block._forward = forward  # type: ignore[assignment]
