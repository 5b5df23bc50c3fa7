"""The cascade in plain PyTorch: caption -> text embedding -> prior -> decoder -> upsamplers (unCLIP §2), whole or in parts.

`Pipeline` holds the loaded stages and encodes; `pipeline(prompts, seeds)` makes pictures of captions; `pipeline.draw(seeds)`
gives the stages one by one, each with tensors that may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from unclip.config.base import ConfigError
from unclip.models.clip import ClipModel, Tokenizer
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import (
    UPSAMPLERS,
    Cascade,
    CascadeOutput,
    GenerationOptions,
    UpsamplerName,
    plan_cascade,
)
from unclip.pipelines.draw import Draw, StageProgress, Watch
from unclip.pipelines.guides import DecoderGuide, GuideName, build_guide, check_label
from unclip.pipelines.stages import (
    AnyPriorStage,
    AnyPriorStageConfig,
    DecoderStage,
    DecoderStageConfig,
    StageConfig,
    StageName,
    UpsamplerStage,
    UpsamplerStageConfig,
)

AS_STORED = GenerationOptions()
"""Every stage as its bundle has it."""


class Pipeline:
    """Pictures for prompts or embeddings: the same for the same input and seed, alone or in any batch (within float tolerance).

    Args:
        decoder, prior, upsamplers: the stages, on `device`; a stage of your own needs what `Draw` asks of ours.
        clip: CLIP of the space that prior and decoder were trained in, on `device`. Prompts need it and the prior for
            decoders that are told an image embedding, it alone for those told CLIP's text states; embeddings from
            elsewhere need neither.
        guides: what the decoder may be guided by, on `device`.
    """

    def __init__(
        self,
        decoder: DecoderStage,
        *,
        clip: ClipModel | None = None,
        prior: AnyPriorStage | None = None,
        upsamplers: Mapping[UpsamplerName, UpsamplerStage] = MappingProxyType({}),
        guides: Mapping[GuideName, DecoderGuide] = MappingProxyType({}),
        device: torch.device | str = "cpu",
    ) -> None:
        states = decoder.config.model.text_states
        if clip is not None and states is not None and states.context_length != clip.context_length:
            raise ValueError(
                f"the decoder takes the states of {states.context_length} tokens; its CLIP has {clip.context_length}"
            )
        self.decoder, self.clip, self.prior = decoder, clip, prior
        self.upsamplers, self.guides = upsamplers, guides
        self.device = torch.device(device)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle | str,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        options: GenerationOptions = AS_STORED,
        with_prior: bool = True,
    ) -> Pipeline:
        """Loads what `options` need of a bundle (or of the one at an address).

        Args:
            dtype: precision of the networks, float32 or bfloat16; CLIP and the samplers stay float32.
            with_prior: False where image embeddings will come from pictures alone.
        """
        bundle = Bundle.load(bundle) if isinstance(bundle, str) else bundle
        cascade, configs = plan_cascade(bundle.configs, options, with_prior=with_prior), bundle.configs
        guiding = cascade.guidance.gradient_scales
        models = {name: bundle.load_model(name).to(device, dtype) for name in (*cascade.sampling, *guiding)}
        decoder, prior = configs["decoder"], configs.get("prior")
        assert isinstance(decoder, DecoderStageConfig)
        upsamplers: dict[UpsamplerName, UpsamplerStage] = {}
        for name in UPSAMPLERS:
            config = configs.get(name)
            if name in models and isinstance(config, UpsamplerStageConfig):
                upsamplers[name] = UpsamplerStage(config, models[name])
        return cls(
            DecoderStage(decoder, models["decoder"]),
            clip=bundle.load_clip().to(device) if decoder.in_clip_space else None,
            prior=prior.stage(models["prior"])
            if isinstance(prior, AnyPriorStageConfig) and "prior" in models
            else None,
            upsamplers=upsamplers,
            guides={name: build_guide(configs[name], models[name]) for name in guiding},
            device=device,
        )

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative_prompts: Sequence[str] | None = None,
        options: GenerationOptions = AS_STORED,
        progress: StageProgress | None = None,
        watch: Watch | None = None,
    ) -> CascadeOutput:
        """Pictures for `prompts`, each with its seed, of every size up to `options.up_to`.

        A prompt is a caption, or for a decoder of classes one of their names; `ConfigError` where it is none.
        Classifier-free guidance leads away from `negative_prompts`, one for each prompt; None: from no caption at all.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"one seed for each prompt is needed, not {len(seeds)} seeds for {len(prompts)} prompts")
        cascade = plan_cascade(self.configs, options)  # with the prior, which prompts cannot do without
        draw = self.draw(seeds, options=options, progress=progress, watch=watch)
        image_embed = None
        if "prior" in cascade.sampling:
            image_embed = draw.prior(prompts, negative_prompts=negative_prompts)
        return draw.cascade_of(prompts=prompts, negative_prompts=negative_prompts, image_embed=image_embed)

    def draw(
        self,
        seeds: Sequence[int],
        *,
        options: GenerationOptions = AS_STORED,
        progress: StageProgress | None = None,
        watch: Watch | None = None,
    ) -> Draw:
        """The stages one by one, for a picture of each seed.

        Args:
            progress: called after every step of a stage.
            watch: called at every step of a stage with what it will come to: z_i, and what the pictures look like.
        """
        return Draw(self, seeds, options=options, progress=progress, watch=watch)

    def plan(self, options: GenerationOptions) -> Cascade:
        """What `options` make of the stages that are here; a prior counts where there is one."""
        return plan_cascade(self.configs, options, with_prior=self.prior is not None)

    @property
    def configs(self) -> dict[StageName, StageConfig]:
        """Of the stages that are here."""
        configs: dict[StageName, StageConfig] = {"decoder": self.decoder.config}
        if self.prior is not None:
            configs["prior"] = self.prior.config
        configs |= {name: guide.config for name, guide in self.guides.items()}
        return configs | {name: stage.config for name, stage in self.upsamplers.items()}

    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """z_t (B, D) of captions, unit norm."""
        clip = self._required_clip("a text embedding")
        return clip.encode_text(clip.tokenize(prompts))

    def encode_image(self, pictures: npt.NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
        """z_i (B, D) of pictures uint8 (B, H, W, 3), of unit norm unless the decoder's are not."""
        clip = self._required_clip("the embedding of a picture")
        return clip.encode_image(pictures, unit_norm=self.decoder.config.unit_norm)

    def told(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the decoder is told of prompts themselves: tokens, CLIP's states of them, or the class that they name."""
        config = self.decoder.config
        length, found = config.model.context_length, dict[str, torch.Tensor]()
        if length is not None:
            found["tokens"] = self.tokens(prompts, length)
        if config.model.num_classes is not None:
            found["label"] = _labels(prompts, config.classes).to(self.device)
        if config.model.text_states is not None:
            clip = self._required_clip("a decoder that is told its text states")
            found["text_states"] = clip.encode_text_states(clip.tokenize(prompts))[1]
        return found

    def tokens(self, prompts: Sequence[str], context_length: int) -> torch.Tensor:
        """(B, context_length) int64 of CLIP's byte-pair encoding."""
        return torch.from_numpy(Tokenizer(None)(prompts, context_length)).to(self.device, torch.int64)

    def _required_clip(self, purpose: str) -> ClipModel:
        if self.clip is None:
            raise ConfigError(f"{purpose} needs a CLIP; this pipeline has none")
        return self.clip


def _labels(prompts: Sequence[str], classes: Sequence[str]) -> torch.Tensor:
    """(B,) int64: the position among `classes` of the one that each prompt names."""
    for prompt in prompts:
        check_label("prompt", prompt, classes)
    return torch.tensor([classes.index(prompt) for prompt in prompts])
