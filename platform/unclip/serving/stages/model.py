"""What a server knows of its bundle without any weights: for validation, for answers, and for the way of a picture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from unclip.generation.engine.request import Request
from unclip.generation.engine.route import plan_request
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import Cascade, GenerationOptions, plan_cascade
from unclip.pipelines.stages import ClipStageConfig, DecoderStageConfig, StageConfig, StageName
from unclip.utils import storage

_HUB_PREFIX = "hf-hub:"


@dataclass(frozen=True)
class Model:
    """A bundle as the API sees it.

    Args:
        bundle: its manifests and configurations.
        options: of the server: how stages sample unless a request says otherwise, and the largest picture.
        sizes: sides in pixels of what the stages make, ascending.
        loaded_at: unix seconds.
    """

    bundle: Bundle
    options: GenerationOptions
    sizes: tuple[int, ...]
    loaded_at: int

    @classmethod
    def load(cls, uri: str, options: GenerationOptions) -> Model:
        """Of the bundle at `uri`.

        Raises `BundleError` for one that is damaged or cannot draw, and `ConfigError` where the options do not suit it.
        """
        bundle = Bundle.load(uri)
        # A bundle without a prior still draws what image embeddings say.
        cascade = plan_cascade(bundle.configs, options, with_prior="prior" in bundle.configs)
        return cls(bundle, options, tuple(sorted(cascade.sizes.values())), int(time.time()))

    @cached_property
    def digest(self) -> str:
        """The bundle's; the revision of the weights."""
        return self.bundle.digest

    @property
    def configs(self) -> Mapping[StageName, StageConfig]:
        """Of all stages."""
        return self.bundle.configs

    @property
    def embed_dim(self) -> int | None:
        """Width D of the image embeddings that the decoder is told; None where it is told none."""
        return self._decoder.model.embed_dim

    @cached_property
    def clip_image_size(self) -> int | None:
        """Side in pixels of the pictures that the bundle's CLIP sees; None without a CLIP."""
        own = self.configs.get("clip")
        if isinstance(own, ClipStageConfig):
            return own.architecture.image_size
        return None if self.bundle.clip is None else image_size_of(self.bundle.clip.source)

    @property
    def classes(self) -> tuple[str, ...]:
        """What a prompt may be where the decoder draws classes; empty where it takes captions."""
        return self._decoder.classes

    @property
    def attribution(self) -> str:
        """What the licences of its training data want said; empty where they want nothing."""
        return self.bundle.attribution

    def plan(self, request: Request) -> Cascade:
        """The stages that `request` goes through.

        Raises `ConfigError` or `ValueError` naming what does not suit them, and `BundleError` where a stage is missing.
        """
        return plan_request(request, self.configs)

    @property
    def _decoder(self) -> DecoderStageConfig:
        decoder = self.configs["decoder"]
        assert isinstance(decoder, DecoderStageConfig)
        return decoder


class Models:
    """The model that is used now, and the one before: requests that began with it may end with it."""

    def __init__(self, first: Model) -> None:
        self._current = first
        self._previous: Model | None = None

    @property
    def current(self) -> Model:
        """Of new requests."""
        return self._current

    @property
    def previous(self) -> Model | None:
        """The one before; None before any change."""
        return self._previous

    def use(self, model: Model) -> None:
        """`model` from now on."""
        if model.digest != self._current.digest:
            self._previous = self._current
        self._current = model


def image_size_of(source: str) -> int:
    """Of a CLIP outside of the bundle, by its configuration alone; `source` is what `load_clip` takes."""
    is_hub = source.startswith(_HUB_PREFIX)
    description = storage.join(source, "config.json")
    if not is_hub and storage.exists(description):
        folder = storage.read_json(description)
        own = folder.get("architecture")
        return image_size_of(folder["source"]) if own is None else int(own["image_size"])
    import open_clip

    known = open_clip.get_model_config(source if is_hub else source.partition("/")[0])
    if known is None:
        raise BundleError(f"CLIP {source!r}: open_clip knows no such architecture")
    size = known["vision_cfg"]["image_size"]
    return int(size if isinstance(size, int) else size[0])
