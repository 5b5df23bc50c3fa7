"""What a reproduction is asked for, and its recipes: the networks that are trained, how long, and on what."""

from __future__ import annotations

from pydantic import Field, model_validator

from unclip.config.base import Config
from unclip.recipes import RECIPES as STAGES
from unclip.training.config import TrainConfig
from unclip.training.objectives.ar_prior import ARPriorObjectiveConfig
from unclip.training.objectives.clip import ClipObjectiveConfig
from unclip.training.objectives.decoder import DecoderObjectiveConfig
from unclip.training.objectives.prior import PriorObjectiveConfig


class ReproduceConfig(Config):
    """The networks that the findings compare, and how much is drawn of each.

    Of each run seed, addresses and CLIP are filled in, and what the finding changes; `ar_prior` trains for as many FLOPs
    as `prior`, whatever its `loop.max_steps`.
    """

    out: str
    """Folder or s3:// address of data, networks, measurements and result. The same command goes on with it."""
    data: str | None = None
    """Records: a folder with `train` and `heldout`, as jobs/prepare_openmoji.py writes OUT/64; null draws shapes."""
    drawn: int = Field(default=8192, ge=1)
    """Shapes that are drawn for training, where no records are given; an eighth as many are held out."""
    seeds: int = Field(default=3, ge=2)
    """Seeds 0, 1, …: each trains every prior and decoder anew and draws with noise of its own. CLIP is trained once."""
    captions: int = Field(default=100, ge=2)
    """Held-out captions that pictures are drawn for, at most those that there are."""
    pictures: int = Field(default=2, ge=2)
    """Pictures of each caption: what diversity is measured between."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where everything runs; auto takes a CUDA device where there is one."""
    clip: TrainConfig
    """Trained twice: z_i and z_t come from the first; the second, of another seed, judges pictures and is told nothing."""
    prior: TrainConfig
    """The diffusion prior."""
    ar_prior: TrainConfig
    """The autoregressive prior."""
    decoder: TrainConfig
    """The decoder."""

    @model_validator(mode="after")
    def _consistent(self) -> ReproduceConfig:
        objectives = {name: getattr(self, name).objective for name in ("clip", "prior", "ar_prior", "decoder")}
        kinds = (ClipObjectiveConfig, PriorObjectiveConfig, ARPriorObjectiveConfig, DecoderObjectiveConfig)
        for (name, objective), kind in zip(objectives.items(), kinds, strict=True):
            if not isinstance(objective, kind):
                raise ValueError(f"{name}.objective.kind = {objective.kind!r}: must be {name!r}")
        width = objectives["clip"].architecture.embed_dim
        for name in ("prior", "ar_prior", "decoder"):
            found = objectives[name].stage.model.embed_dim
            if found != width:
                raise ValueError(
                    f"{name}.objective.stage.model.embed_dim = {found}: must be clip.objective.architecture.embed_dim = {width}"
                )
        return self

    @property
    def side(self) -> int:
        """Of the decoder's pictures in pixels."""
        assert isinstance(self.decoder.objective, DecoderObjectiveConfig)
        return self.decoder.objective.stage.image_size


def _loop(steps: int, batch: int) -> dict[str, object]:
    """Ends by the number of steps, so that the result does not depend on the machine's speed."""
    return {
        "max_steps": steps,
        "global_batch_size": batch,
        "microbatch_size": batch,
        "time_limit_s": None,
        "log_every": 20,
        "checkpoint_every_s": 30.0,
        "keep_checkpoints": 1,
    }


def shapes() -> ReproduceConfig:
    """Drawn shapes of 32 pixels, for two CPU cores: the networks of `demo`, smaller."""
    text = {"context_length": 16, "width": 64, "depth": 1, "heads": 2}
    prior = {"embed_dim": 64, "context_length": 16, "width": 128, "depth": 3, "heads": 4}
    architecture = {
        "embed_dim": 64,
        "image_size": 32,
        "vision_layers": 2,
        "vision_width": 96,
        "vision_patch_size": 8,
        "vision_head_width": 32,
        "context_length": 16,
        "text_width": 64,
        "text_heads": 2,
        "text_layers": 2,
    }
    unet = {"channels": 32, "channel_mult": [1, 2, 2], "head_channels": 32, "patch_size": 2, "image_size": 32}
    decoder = {
        "model": {"unet": unet, "text": text, "embed_dim": 64},
        "sampling": {"num_inference_steps": 8},
        "image_size": 32,
    }
    return ReproduceConfig(
        out="runs/reproduce",
        clip=STAGES["clip"]["demo"]().merged({"objective": {"architecture": architecture}, "loop": _loop(400, 256)}),
        prior=STAGES["prior"]["demo"]().merged({"objective": {"stage": {"model": prior}}, "loop": _loop(600, 128)}),
        ar_prior=STAGES["prior"]["ar_demo"]().merged(
            {"objective": {"stage": {"model": prior | {"num_components": 32}}}, "loop": _loop(600, 128)}
        ),
        decoder=STAGES["decoder"]["demo"]().merged(
            # Many small steps at a low rate: with fewer at the demo's, decoders learn z_i, but nothing of captions.
            {"objective": {"stage": decoder}, "optimizer": {"learning_rate": 6e-4}, "loop": _loop(2800, 8)}
        ),
    )


def openmoji() -> ReproduceConfig:
    """OpenMoji at 64 pixels with the networks of `demo`, for a GPU; `data` is what jobs/prepare_openmoji.py wrote."""
    return ReproduceConfig(
        out="runs/reproduce-openmoji",
        data="data/openmoji/64",
        pictures=4,
        clip=STAGES["clip"]["demo"]().merged({"loop": _loop(3000, 256)}),
        prior=STAGES["prior"]["demo"]().merged({"loop": _loop(5000, 256)}),
        ar_prior=STAGES["prior"]["ar_demo"]().merged({"loop": _loop(5000, 256)}),
        decoder=STAGES["decoder"]["demo"]().merged({"loop": _loop(20_000, 64)}),
    )


def debug() -> ReproduceConfig:
    """Two seeds of two steps each, for tests."""
    return ReproduceConfig(
        out="runs/debug/reproduce",
        drawn=64,
        seeds=2,
        captions=4,
        clip=STAGES["clip"]["debug"](),
        prior=STAGES["prior"]["debug"](),
        ar_prior=STAGES["prior"]["ar_debug"](),
        decoder=STAGES["decoder"]["debug"](),
    )


RECIPES = {"shapes": shapes, "openmoji": openmoji, "debug": debug}
