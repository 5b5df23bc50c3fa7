from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def randomized() -> Callable[[nn.Module], nn.Module]:
    """Gives every weight a random value, also those that start as zero and would hide what a test looks at."""

    def apply(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                spread = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        return module.eval()

    return apply
