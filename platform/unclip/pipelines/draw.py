"""Pictures of given seeds, stage by stage: every stage takes tensors, wherever they come from, and hands out its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

import torch

from unclip.config.base import ConfigError
from unclip.diffusion.guidance import Denoise, Guide
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.samplers import Progress
from unclip.models.prior import PriorCondition
from unclip.pipelines.cascade import CascadeOutput, GenerationOptions
from unclip.pipelines.guides import combined_guide
from unclip.pipelines.known import KnownPixels
from unclip.pipelines.pictures import to_signed, to_uint8
from unclip.pipelines.stages import PriorStage, StageName
from unclip.pipelines.stages.decoder import ConditionPart
from unclip.pipelines.stages.draws import best_draw, draws_of, of_all_draws
from unclip.utils.random import SampleGenerator

if TYPE_CHECKING:
    from unclip.pipelines.pipeline import Pipeline

StageProgress = Callable[[str, int, int], None]
"""progress(stage, steps done, steps in all), called after every sampling step."""

Watch = Callable[[str, slice, torch.Tensor], None]
"""watch(stage, rows, predicted): what these n rows of the draw are predicted to become, at every step.

Pictures uint8 (n, S, S, 3), or of the prior the best of its draws so far, z_i (n, D) of unit norm. An autoregressive prior
has no prediction of the whole before its last code, and is not shown.
"""

_INPUTS: dict[ConditionPart, tuple[str, ...]] = {
    "image": ("image_embed",),
    "text": ("tokens", "text_states"),
    "label": ("label",),
}


class Draw:
    """One request: the stages for a picture of each of B seeds, of which every stage has a random stream of its own.

    The same seed gives the same picture as `Pipeline.__call__`, in any batch. `ConfigError` or `BundleError` where the
    pipeline cannot do what `options` ask for; arguments as for `Pipeline.draw`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        seeds: Sequence[int],
        *,
        options: GenerationOptions,
        progress: StageProgress | None,
        watch: Watch | None,
    ) -> None:
        self.pipeline = pipeline
        self.cascade = pipeline.plan(options)
        self._streams = SampleGenerator.for_samples(0, _seed_tensor(seeds), pipeline.device)
        self._max_pixels = options.max_pixels
        self._progress, self._watch = progress, watch

    @torch.no_grad()
    def prior(
        self,
        prompts: Sequence[str],
        *,
        text_embed: torch.Tensor | None = None,
        negative_prompts: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """z_i (B, D) of unit norm for B captions.

        Args:
            text_embed: (B, D) z_t, unit norm; None: CLIP's of the captions.
            negative_prompts: B captions that guidance leads away from; None: from no caption at all.

        Raises `ConfigError` where there is no prior, or no decoder that is told its z_i.
        """
        stage = self.pipeline.prior
        if stage is None:
            raise ConfigError("the image embedding of a caption needs a prior; this pipeline has none")
        if "prior" not in self.cascade.sampling:
            told = ", ".join(self.pipeline.decoder.config.model.inputs)
            raise ConfigError(f"the decoder is told {told}, not an image embedding: there is none to draw")
        if text_embed is None:
            text_embed = self.pipeline.encode_text(prompts)
        length = stage.config.model.context_length
        inputs = {"text_embed": text_embed, "tokens": self.pipeline.tokens(prompts, length)}
        if negative_prompts is not None:
            self._check_count("negative_prompts", negative_prompts)
            inputs["negative_text_embed"] = self.pipeline.encode_text(negative_prompts)
            inputs["negative_tokens"] = self.pipeline.tokens(negative_prompts, length)
        return self._run("prior", inputs, lambda part: self._image_embed(stage, part))

    @torch.no_grad()  # inference_mode would leave no way to take the gradients of guides
    def decode(
        self,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None,
        image_embed: torch.Tensor | None = None,
        x_T: torch.Tensor | None = None,
        known: KnownPixels | None = None,
    ) -> torch.Tensor:
        """The decoder's pictures, uint8 (B, S, S, 3). What is not given, the decoder does not see.

        Args:
            prompts: B captions, or names of classes for a decoder of those.
            negative_prompts: B captions that guidance leads away from; None: from no caption and no z_i.
            image_embed: (B, D) z_i, unit norm.
            x_T: (B, 3, S, S) to begin from; None: drawn from the seeds.
            known: pixels that the pictures shall have, (B, S, S).

        Raises `ValueError` where a tensor is not what the stage takes, and `ConfigError` where it is not told such a thing.
        """
        pipeline, guidance = self.pipeline, self.cascade.guidance
        config = pipeline.decoder.config
        self._check_known({} if known is None else {config.image_size: known}, [config.image_size])
        if image_embed is not None and config.model.embed_dim is None:
            raise ConfigError(f"the decoder is told {', '.join(config.model.inputs)}, not an image embedding")
        told = {} if prompts is None else pipeline.told(prompts)
        away = self._away(negative_prompts)
        if image_embed is not None:
            told["image_embed"] = image_embed.to(pipeline.device)
        dropped = {part for part, names in _INPUTS.items() if not set(names) & told.keys()}
        targets = self._targets(prompts)

        def sample(part: _Part) -> torch.Tensor:
            inputs = dict(part.inputs)
            terms = [
                (scale, pipeline.guides[name].log_probability(inputs.pop(name)))
                for name, scale in guidance.gradient_scales.items()
            ]
            process, pixels = pipeline.decoder.process, self._known(known, part)
            inner = combined_guide(terms, process) if terms else None
            if pixels is not None and config.model.inpainting:
                inputs |= pixels.told
            z_i, tokens, noise = (inputs.pop(name, None) for name in ("image_embed", "tokens", "x_T"))
            negative = {name: inputs.pop(f"negative_{name}") for name in away}
            start = pipeline.decoder.begin(
                z_i,
                tokens,
                part.how["generator"],
                further=inputs,
                dropped=dropped,
                negative=None if negative_prompts is None else negative,
            ).at(noise)
            guide = self._guide("decoder", part, process, known=pixels, inner=inner)
            drawn = pipeline.decoder.run(start, guide=guide, **part.how)
            return to_uint8(drawn) if pixels is None else pixels.compose(to_uint8(drawn))

        told |= targets | {f"negative_{name}": tensor for name, tensor in away.items()}
        return self._run("decoder", told | ({} if x_T is None else {"x_T": x_T.to(pipeline.device)}), sample)

    @torch.no_grad()
    def upsample(
        self, pictures: torch.Tensor, *, known: Mapping[int, KnownPixels] | None = None
    ) -> dict[int, torch.Tensor]:
        """The larger pictures by their size, uint8 (B, S, S, 3), each made of the one before.

        Args:
            pictures: uint8 (B, s, s, 3) of any size that an upsampler of the cascade takes.
            known: by size, pixels that the pictures shall have, (B, S, S).

        Raises `ValueError` where pictures or known pixels are not what the cascade takes.
        """
        made: dict[int, torch.Tensor] = {}
        shape, sizes = tuple(pictures.shape), self.cascade.sizes.values()
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or shape[2:] != (shape[1], 3):
            raise ValueError(f"pictures must be uint8 (B, s, s, 3), not {pictures.dtype} {shape}")
        if shape[1] not in sizes:
            raise ValueError(f"pictures of {shape[1]} pixels: this cascade knows those of {', '.join(map(str, sizes))}")
        self._check_known(known or {}, [size for size in sizes if size > shape[1]])
        pictures = pictures.to(self.pipeline.device)
        for name, stage in self.pipeline.upsamplers.items():
            size = stage.config.image_size
            if name not in self.cascade.sizes or size <= pictures.shape[1]:
                continue
            # From 8 bits, as in training and in GLIDE: the next stage sees the picture that is handed out.
            pictures = self._upsampled(name, to_signed(pictures), (known or {}).get(size))
            made[size] = pictures
        return made

    def cascade_of(
        self,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None,
        image_embed: torch.Tensor | None = None,
        x_T: torch.Tensor | None = None,
        known: Mapping[int, KnownPixels] | None = None,
    ) -> CascadeOutput:
        """Pictures of every size: `decode`, then `upsample`; `known` by size, the other arguments as there."""
        size, known = self.cascade.sizes["decoder"], dict(known or {})
        self._check_known(known, self.cascade.sizes.values())
        pictures = self.decode(
            prompts=prompts,
            negative_prompts=negative_prompts,
            image_embed=image_embed,
            x_T=x_T,
            known=known.pop(size, None),
        )
        images = {size: pictures} | self.upsample(pictures, known=known)
        return CascadeOutput(
            None if image_embed is None else image_embed.cpu(),
            {side: made.cpu().numpy() for side, made in images.items()},
        )

    @property
    def count(self) -> int:
        return len(self._streams.keys)

    def _image_embed(self, stage: Any, part: _Part) -> torch.Tensor:
        """z_i (n, D) of the captions of `part`; a prior that denoises can be watched."""
        inputs, negative = part.inputs, None
        if "negative_tokens" in inputs:
            negative = PriorCondition.of_captions(inputs["negative_text_embed"], inputs["negative_tokens"])
        z_t, tokens, generator = inputs["text_embed"], inputs["tokens"], part.how["generator"]
        if not isinstance(stage, PriorStage):
            return cast("torch.Tensor", stage.sample(z_t, tokens, negative=negative, **part.how))
        texts, captions, streams = draws_of(z_t, tokens, generator, stage.config.num_draws)
        guide = self._guide("prior", part, stage.process, show=lambda drawn: best_draw(stage.finish(drawn), z_t))
        away = None if negative is None else of_all_draws(negative, stage.config.num_draws)
        start = stage.begin(texts, captions, streams, negative=away)
        return best_draw(stage.run(start, guide=guide, **part.how | {"generator": streams}), z_t)

    def _upsampled(self, name: Any, low_res: torch.Tensor, known: KnownPixels | None) -> torch.Tensor:
        stage = self.pipeline.upsamplers[name]

        def sample(part: _Part) -> torch.Tensor:
            pixels = self._known(known, part)
            guide = self._guide(name, part, stage.process, known=pixels)
            drawn = to_uint8(stage.sample(**part.inputs, guide=guide, **part.how))
            return drawn if pixels is None else pixels.compose(drawn)

        return self._run(name, {"low_res": low_res}, sample)

    def _targets(self, prompts: Sequence[str] | None) -> dict[str, torch.Tensor]:
        """What the decoder is guided towards, by guide."""
        guidance, targets = self.cascade.guidance, dict[str, torch.Tensor]()
        for name in guidance.gradient_scales:
            if prompts is None and name == "noised_clip":
                raise ConfigError("options.decoder.clip_guidance_scale: guides towards a prompt, and there is none")
            targets[name] = self.pipeline.guides[name].target(prompts or [""] * self.count, guidance)
        return targets

    def _away(self, negative_prompts: Sequence[str] | None) -> dict[str, torch.Tensor]:
        """What the decoder is told of captions that guidance leads away from."""
        if negative_prompts is None:
            return {}
        self._check_count("negative_prompts", negative_prompts)
        if self.cascade.classes:
            raise ConfigError("negative_prompts: the decoder knows classes, and no captions")
        return self.pipeline.told(negative_prompts)

    def _check_count(self, name: str, texts: Sequence[str]) -> None:
        if len(texts) != self.count:
            raise ValueError(f"{name}: one for each of {self.count} seeds is needed, not {len(texts)}")

    def _known(self, known: KnownPixels | None, part: _Part) -> KnownPixels | None:
        return None if known is None else known.select(part.rows, self.pipeline.device)

    def _check_known(self, known: Mapping[int, KnownPixels], sizes: Collection[int]) -> None:
        for size, pixels in known.items():
            if size not in sizes:
                made = ", ".join(map(str, sizes)) or "none"
                raise ValueError(f"known pixels of {size}x{size} pictures: what is to be drawn are those of {made}")
            if pixels.mask.shape != (self.count, size, size):
                expected, found = (self.count, size, size), tuple(pixels.mask.shape)
                raise ValueError(f"known pixels at {size} must have a mask {expected}, not {found}")

    def _guide(
        self,
        name: StageName,
        part: _Part,
        process: DiffusionProcess,
        *,
        known: KnownPixels | None = None,
        inner: Guide | None = None,
        show: Callable[[torch.Tensor], torch.Tensor] = to_uint8,
    ) -> Guide | None:
        """The gradients first, then the known pixels, which they must not move, and what is shown of all that last."""
        guides = [inner] if inner is not None else []
        if known is not None:
            guides.append(known.guide(process))
        if self._watch is not None:
            watch = self._watch
            guides.append(_watching(lambda x_start: watch(name, part.rows, show(x_start)), process))
        return (lambda denoise: reduce(lambda network, guide: guide(network), guides, denoise)) if guides else None

    def _run(
        self, name: StageName, inputs: Mapping[str, torch.Tensor], sample: Callable[[_Part], torch.Tensor]
    ) -> torch.Tensor:
        """What `sample` makes of `inputs`, each (B, ...): as many pictures at once as memory is meant to hold."""
        for key, tensor in inputs.items():
            if len(tensor) != self.count:
                raise ValueError(f"{key} has {len(tensor)} rows for {self.count} seeds")
        keys = self._streams.child(name).keys
        at_once = max(1, self._max_pixels // self.cascade.sizes.get(name, 1) ** 2)
        starts = range(0, len(keys), at_once)
        outputs = []
        for index, start in enumerate(starts):
            rows = slice(start, start + at_once)
            how = {
                "generator": SampleGenerator(keys[rows]),
                "sampling": self.cascade.sampling[name],
                "progress": self._progress_of(name, index, len(starts)),
            }
            outputs.append(sample(_Part(rows, {key: tensor[rows] for key, tensor in inputs.items()}, how)))
        return torch.cat(outputs)

    def _progress_of(self, name: StageName, index: int, parts: int) -> Progress | None:
        """The progress of micro-batch `index` as a share of all `parts`."""
        report = self._progress
        if report is None:
            return None
        return lambda done, steps: report(name, index * steps + done, parts * steps)


@dataclass(frozen=True)
class _Part:
    """Rows of a draw that go through a stage together: their inputs, and how the stage samples them."""

    rows: slice
    inputs: dict[str, Any]
    how: dict[str, Any]


def _watching(show: Callable[[torch.Tensor], None], process: DiffusionProcess) -> Guide:
    """A guide that changes nothing and shows the clean samples that are predicted."""

    def watched(denoise: Denoise[Any]) -> Denoise[Any]:
        def shown(x_t: torch.Tensor, timesteps: torch.Tensor, cond: Any) -> torch.Tensor:
            model_output = denoise(x_t, timesteps, cond)
            prediction, _ = process.split(model_output.to(x_t.dtype))
            show(process.pred_x_start(prediction, x_t, timesteps))
            return model_output

        return shown

    return watched


def _seed_tensor(seeds: Sequence[int]) -> torch.Tensor:
    for seed in seeds:
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed {seed}: must fit into 64 bits")
    return torch.tensor(list(seeds), dtype=torch.int64)
