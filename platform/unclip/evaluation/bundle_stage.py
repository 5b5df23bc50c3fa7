"""A stage of a bundle that is to be judged: found right before work begins, loaded where it samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unclip.config.base import ConfigError
from unclip.data.manifest import DataError
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.stages import StageConfig, StageName
from unclip.utils.random import SampleGenerator


@dataclass(frozen=True)
class BundleStage:
    """Which stage of which bundle. Small, since it goes to every process that samples: its configuration need not be.

    Args:
        uri: of the bundle, absolute.
        name: of the stage.
        digest: of the bundle.
    """

    uri: str
    name: StageName
    digest: str

    @classmethod
    def of(cls, bundle: Bundle, name: StageName) -> BundleStage:
        """`ConfigError` where the bundle has no such stage."""
        if name not in bundle.configs:
            raise ConfigError(f"bundle = {bundle.uri!r}: has no stage {name!r}; it has {', '.join(bundle.configs)}")
        return cls(bundle.uri, name, bundle.digest)

    @property
    def protocol(self) -> dict[str, Any]:
        """Which bundle, as JSON values."""
        return {"uri": self.uri, "digest": self.digest}

    def load(self, device: str) -> tuple[StageConfig, nn.Module]:
        """Its configuration and network; `BundleError` where the bundle has changed since."""
        bundle = Bundle.load(self.uri)
        if bundle.digest != self.digest:
            raise BundleError(f"{self.uri!r} is not the bundle that this job began with")
        return bundle.configs[self.name], bundle.load_model(self.name).to(device)


def check_embeddings(bundle: Bundle, uri: str, fingerprint: str | None) -> None:
    """Raises `DataError` where the embeddings in the folder `uri` are not of the bundle's CLIP, which it has."""
    assert bundle.clip is not None
    if fingerprint != bundle.clip.fingerprint:
        raise DataError(
            f"records: {uri!r} has embeddings of the CLIP with fingerprint {fingerprint}, bundle {bundle.uri!r} belongs "
            f"to {bundle.clip.fingerprint}"
        )


def streams_of(seed: int, ids: Sequence[int] | torch.Tensor, device: str) -> SampleGenerator:
    """The noise of each record's sample: of (seed, id) alone."""
    return SampleGenerator.for_samples(seed, torch.as_tensor(ids), device).child("sample")
