"""An UnCLIP folder of diffusers to stages of ours: text-to-image (`UnCLIPPipeline`) and image variation.

The stages are those of Karlo: captions through CLIP's text transformer, which prior and decoder have inside; embeddings that
are not of unit norm; an upsampler with a second network for its last step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from unclip.diffusion.samplers import SamplingConfig
from unclip.interop import hf_clip
from unclip.interop.base import ImportedStage, Source, shapes_of
from unclip.interop.diffusers import configs, networks
from unclip.interop.diffusers.index import EXTRAS, TEXT_TO_IMAGE, VARIATION
from unclip.interop.diffusers.schedulers import SPACING, process_of
from unclip.interop.diffusers.tokenizer import check_tokenizer
from unclip.interop.folder import read_config, read_object, read_tensors
from unclip.interop.hf_clip_folder import check_pictures, clip_stage
from unclip.interop.keys import Account, Entry, InteropError, prefixed, to_ours
from unclip.interop.settings import Settings, checked
from unclip.models.decoder import DecoderConfig
from unclip.models.upsampler import UpsamplerConfig
from unclip.pipelines.bundle import ClipReference
from unclip.pipelines.clips import load_clip_named
from unclip.pipelines.stages import (
    ClipStageConfig,
    DecoderStageConfig,
    PriorStageConfig,
    StageConfig,
    UpsamplerStageConfig,
)

# The pipelines' own defaults, which their folders do not hold.
_STEPS = {"prior": 25, "decoder": 25, "upsampler_256": 7}
_SCALES = {"prior": 4.0, "decoder": 8.0, "upsampler_256": 1.0}
_LOGIT_SCALE = 4.605170249938965
"""Logarithm of 100, where CLIPs' training caps it; folders hold none, and pictures do not depend on it."""
_POSITIONS = {
    "text_encoder": "text_model.embeddings.position_ids",
    "image_encoder": "vision_model.embeddings.position_ids",
}


def import_folder(source: Source) -> Iterator[ImportedStage]:
    """The stages of the folder `source.path`; see `unclip.interop.base.Importer`."""
    folder = Path(source.path)
    name = read_object(folder / "model_index.json").get("_class_name")
    if name not in (TEXT_TO_IMAGE, VARIATION):
        raise InteropError(f"{source.path}: _class_name = {name!r}: must be {TEXT_TO_IMAGE} or {VARIATION}")
    return _Folder(folder, source.clip).stages(with_prior=name == TEXT_TO_IMAGE)


class _Folder:
    """A folder that is being read; its text encoder, which two stages need, is read once."""

    def __init__(self, folder: Path, clip: str | None) -> None:
        self.folder, self.clip = folder, clip
        extras = folder / EXTRAS
        self.extras: Mapping[str, Any] = read_object(extras) if extras.exists() else {}
        settings = read_config(folder, "text_encoder")
        self.text = hf_clip.text_config(settings, hf_clip.embed_dim(settings))
        self.notes = check_tokenizer(folder / "tokenizer", self.text.context_length)
        self.text_tensors = read_tensors(folder / "text_encoder")

    def stages(self, *, with_prior: bool) -> Iterator[ImportedStage]:
        if (self.folder / "image_encoder").exists():
            stage = self._clip_stage()
            assert stage.clip is not None
            reference = stage.clip
            yield stage
        else:
            reference = self._named_clip()
        if with_prior:
            yield self._prior(reference)
        yield self._decoder(reference)
        yield self._upsampler()

    def _clip_stage(self) -> ImportedStage:
        architecture = hf_clip.architecture(self.text, read_config(self.folder, "image_encoder"))
        check_pictures(read_config(self.folder, "feature_extractor"), architecture)
        config = ClipStageConfig(architecture=architecture)
        entries = [*hf_clip.text_entries(self.text), *hf_clip.vision_entries(architecture)]
        theirs, dropped = dict(self.text_tensors), {}
        theirs |= read_tensors(self.folder / "image_encoder")
        for name in _POSITIONS.values():
            if name in theirs:
                dropped[name] = "counts from 0"
        shapes = shapes_of(config)
        scale = "clip.logit_scale"
        wanted = {name: shape for name, shape in shapes.items() if name != scale}
        tensors, account = to_ours(
            "text_encoder and image_encoder", prefixed(entries, ours="clip."), theirs, wanted, dropped=dropped
        )
        value = self.extras.get("clip", {}).get("logit_scale", _LOGIT_SCALE)
        tensors[scale] = torch.full(shapes[scale], float(value))
        return clip_stage(config, tensors, account, str(self.folder))

    def _named_clip(self) -> ClipReference:
        """The CLIP that the caller names, whose text transformer must be the folder's."""
        if self.clip is None:
            raise InteropError(
                f"{self.folder}: has no image_encoder, and so not the whole of its CLIP: name that, as in "
                "clip=ViT-L-14-quickgelu/openai"
            )
        named = load_clip_named(self.clip)
        if bool(named.description.model.get("quick_gelu")) != self.text.quick_gelu:
            wanted = hf_clip.ACTIVATIONS[self.text.quick_gelu]
            raise InteropError(f"clip = {self.clip!r}: has another activation than the text_encoder, whose is {wanted}")
        state = named.clip.state_dict()
        with torch.device("meta"):
            names = {name: tuple(tensor.shape) for name, tensor in self.text.build().tower.state_dict().items()}
        tensors, _ = self._text_tower("", names)
        stored = next(iter(self.text_tensors.values())).dtype  # folders may be in float16
        for name, tensor in tensors.items():
            other = state.get(name, state.get(f"text.{name}"))
            if other is None or other.shape != tensor.shape or not torch.equal(other.to(stored).float(), tensor):
                raise InteropError(f"clip = {self.clip!r}: its {name} is not that of the folder's text_encoder")
        return ClipReference(source=self.clip, fingerprint=named.fingerprint)

    def _text_tower(
        self, prefix: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, torch.Tensor], Account]:
        position = _POSITIONS["text_encoder"]
        dropped = {position: "counts from 0"} if position in self.text_tensors else {}
        entries = prefixed(hf_clip.text_entries(self.text), ours=prefix)
        return to_ours("text_encoder", entries, self.text_tensors, shapes, dropped=dropped)

    def _prior(self, clip: ClipReference) -> ImportedStage:
        theirs = read_tensors(self.folder / "prior")
        model = configs.prior_config(read_config(self.folder, "prior"), self.text)
        statistics = {name: theirs.get(f"clip_{name}") for name in ("mean", "std")}
        if any(value is None or value.shape != (1, model.embed_dim) for value in statistics.values()):
            raise InteropError(f"prior: clip_mean and clip_std must be there and (1, {model.embed_dim})")
        config = checked(
            "prior",
            PriorStageConfig,
            {
                "model": model.to_dict(),
                "diffusion": process_of("prior_scheduler", read_config(self.folder, "prior_scheduler")).to_dict(),
                "sampling": self._sampling("prior").to_dict(),
                "normalizer": {
                    name: value[0].double().tolist() for name, value in statistics.items() if value is not None
                },
                "unit_norm": False,
                "num_draws": 1,
            },
        )
        entries = [*networks.prior_entries(model), *networks.caption_entries()]
        dropped = {f"clip_{name}": f"is normalizer.{name} of the configuration" for name in statistics}
        return self._with_tower(config, clip, [("prior", entries, theirs, dropped)], "prefix.encoder.tower.")

    def _decoder(self, clip: ClipReference) -> ImportedStage:
        settings = read_config(self.folder, "decoder")
        unet = configs.unet_config("decoder", settings)
        left = Settings("text_proj", read_config(self.folder, "text_proj"), {"clip_extra_context_tokens": 4})
        embed_dim, tokens = left.take("clip_embeddings_dim", int), left.take("clip_extra_context_tokens", int)
        width, time = left.take("cross_attention_dim", int), left.take("time_embed_dim", int)
        left.done()
        for name, mine, theirs in (
            ("cross_attention_dim", width, settings.get("cross_attention_dim")),
            ("time_embed_dim", time, unet.embedding_dim),
            ("clip_embeddings_dim", embed_dim, self.text.embed_dim),
            ("clip_embeddings_dim", embed_dim, self.text.width),
        ):
            if mine != theirs:
                raise InteropError(f"text_proj: {name} = {mine}: decoder and text_encoder have {theirs}")
        model = checked(
            "text_proj",
            DecoderConfig,
            {
                "unet": unet,
                "clip_text": {"encoder": self.text, "width": width},
                "embed_dim": embed_dim,
                "num_image_tokens": tokens,
            },
        )
        config = checked(
            "decoder",
            DecoderStageConfig,
            {
                "model": model.to_dict(),
                "diffusion": process_of("decoder_scheduler", read_config(self.folder, "decoder_scheduler")).to_dict(),
                "sampling": self._sampling("decoder").to_dict(),
                "unit_norm": False,
                "image_size": unet.image_size,
            },
        )
        parts: list[tuple[str, list[Entry], dict[str, torch.Tensor], dict[str, str]]] = [
            ("decoder", prefixed(networks.unet_entries(unet), ours="unet."), read_tensors(self.folder / "decoder"), {}),
            (
                "text_proj",
                prefixed(networks.text_proj_entries(tokens), ours="conditioners."),
                read_tensors(self.folder / "text_proj"),
                {},
            ),
        ]
        return self._with_tower(config, clip, parts, "conditioners.text.encoder.tower.")

    def _upsampler(self) -> ImportedStage:
        first, last = (read_config(self.folder, f"super_res_{which}") for which in ("first", "last"))
        unet = configs.unet_config("super_res_first", first)
        if configs.unet_config("super_res_last", last, image_size=unet.image_size) != unet:
            raise InteropError("super_res_last: its shape is not that of super_res_first")
        size = int(read_config(self.folder, "decoder")["sample_size"])
        config = checked(
            "upsampler_256",
            UpsamplerStageConfig,
            {
                "kind": "upsampler_256",
                "model": UpsamplerConfig(unet=unet, resize="bicubic", last_step=True).to_dict(),
                "diffusion": process_of(
                    "super_res_scheduler", read_config(self.folder, "super_res_scheduler")
                ).to_dict(),
                "sampling": self._sampling("upsampler_256").to_dict(),
                "low_res_size": size,
                "image_size": unet.image_size,
            },
        )
        shapes, tensors, accounts = shapes_of(config), dict[str, torch.Tensor](), list[Account]()
        for part, prefix in (("super_res_first", "unet."), ("super_res_last", "last_unet.")):
            entries = prefixed(networks.unet_entries(unet), ours=prefix)
            wanted = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
            made, account = to_ours(part, entries, read_tensors(self.folder / part), wanted)
            tensors |= made
            accounts.append(account)
        return ImportedStage(config, tensors, None, tuple(accounts))

    def _with_tower(
        self,
        config: StageConfig,
        clip: ClipReference,
        parts: list[tuple[str, list[Entry], dict[str, torch.Tensor], dict[str, str]]],
        prefix: str,
    ) -> ImportedStage:
        """A stage of `parts` and the text encoder, which together are all of it."""
        shapes = dict(shapes_of(config))
        tower = {name: shapes.pop(name) for name in list(shapes) if name.startswith(prefix)}
        tensors, text_account = self._text_tower(prefix, tower)
        accounts = []
        for part, entries, theirs, dropped in parts:
            mine = {entry.ours for entry in entries}
            wanted = {name: shapes.pop(name) for name in list(shapes) if name in mine}
            made, account = to_ours(part, entries, theirs, wanted, dropped=dropped)
            tensors |= made
            accounts.append(account)
        if shapes:
            raise InteropError(f"{config.kind}: nothing in the folder is its {', '.join(sorted(shapes)[:5])}")
        notes = (Account("tokenizer", taken=0, made=0, dropped=self.notes),) if self.notes else ()
        return ImportedStage(config, tensors, clip, (*accounts, text_account, *notes))

    def _sampling(self, stage: str) -> SamplingConfig:
        """As the pipeline samples unless it is told otherwise, or as the bundle did that the folder was made of."""
        stored = self.extras.get(stage, {})
        return SamplingConfig(
            sampler="ddpm",
            timestep_spacing=SPACING,
            num_inference_steps=int(stored.get("num_inference_steps", _STEPS[stage])),
            guidance_scale=float(stored.get("guidance_scale", _SCALES[stage])),
        )
