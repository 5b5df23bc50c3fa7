"""dalle2-pytorch's prior and decoder, trained and sampled by its own trainers; run by the interpreter of its own environment.

`python -m benchmarks.chain.peer train FOLDER …` trains for a time and keeps the moving averages, `sample FOLDER …` draws pictures
of each caption of FOLDER/captions.safetensors. Its CLIP is ours: what that says of every record and caption is computed
once, and stands behind its own adapter, so that its code runs as with any frozen CLIP.

Settings are those of its README (version 1.15): prior with 100 timesteps and a drop rate of 0.2; decoder that predicts the noise
under the cosine schedule, drop rates 0.1 and 0.5; trainers with learning rate 3e-4, weight decay 0.01, a moving average of 0.99
from step 1000 on, every 10th step; guidance 2. `ours` changes what our recipe says otherwise where its code allows: the decoder
predicts the picture under the linear schedule.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-not-found]
from benchmarks.common import parameter_count, version
from dalle2_pytorch import (  # type: ignore[import-not-found]
    DALLE2,
    Decoder,
    DecoderTrainer,
    DiffusionPrior,
    DiffusionPriorNetwork,
    DiffusionPriorTrainer,
    Unet,
)
from dalle2_pytorch.dalle2_pytorch import BaseClipAdapter  # type: ignore[import-not-found]
from safetensors.torch import load_file, load_model, save_file, save_model

TRAINER = {"lr": 3e-4, "wd": 1e-2, "ema_beta": 0.99, "ema_update_after_step": 1000, "ema_update_every": 10}
DECODER: dict[str, dict[str, Any]] = {
    "readme": {},
    "ours": {"predict_x_start": True, "beta_schedule": "linear"},
}
"""By `--settings`."""
GUIDANCE_SCALE = 2.0
PRIOR_TIMESTEPS, DECODER_TIMESTEPS, DECODER_STEPS = 100, 1000, 250
_DIM_MULTS = (1, 2, 4, 8)
_RESNET_GROUPS = 4  # widths in steps of 4 channels
_WIDEST = 128
_PRIOR, _DECODER = "prior.safetensors", "decoder.safetensors"

EmbeddedText = namedtuple("EmbeddedText", ["text_embed", "text_encodings"])


class Embedded(BaseClipAdapter):
    """What a frozen CLIP says of captions that are given as their numbers, (B, 1) int64.

    Args:
        text_embed: (N, D) of unit norm.
        text_encodings: (N, L, W), the states of each caption's tokens, zero behind its end.
    """

    def __init__(self, text_embed: torch.Tensor, text_encodings: torch.Tensor, image_size: int) -> None:
        super().__init__(torch.nn.Identity())
        self._size = image_size
        self.register_buffer("text_embed", text_embed.float(), persistent=False)
        self.register_buffer("text_encodings", text_encodings.float(), persistent=False)

    @property
    def dim_latent(self) -> int:
        return self.text_embed.shape[1]

    @property
    def image_size(self) -> int:
        return self._size

    @property
    def image_channels(self) -> int:
        return 3

    @property
    def max_text_len(self) -> int:
        return self.text_encodings.shape[1]

    def embed_text(self, text: torch.Tensor) -> EmbeddedText:
        return EmbeddedText(self.text_embed[text[:, 0]], self.text_encodings[text[:, 0]])


def build_prior(clip: Embedded, parameters: int) -> Any:
    """Four blocks as wide as the embeddings, whose feed-forward layers are fitted to our number of parameters."""
    dim = clip.dim_latent

    def network(ff_mult: float) -> Any:
        heads = max(1, dim // 32)
        return DiffusionPriorNetwork(
            dim=dim,
            depth=4,
            dim_head=dim // heads,
            heads=heads,
            ff_mult=ff_mult,
            max_text_len=clip.max_text_len,
        )

    with torch.device("meta"):
        narrow, wide = (parameter_count(network(ff_mult)) for ff_mult in (1, 2))
    ff_mult = max(0.5, 1 + (parameters - narrow) / (wide - narrow))
    return DiffusionPrior(net=network(ff_mult), clip=clip, timesteps=PRIOR_TIMESTEPS, cond_drop_prob=0.2)


def build_decoder(clip: Embedded, parameters: int, settings: str, steps: int) -> Any:
    """Its U-Net of four levels, of the width whose number of parameters is nearest to ours."""

    def unet(dim: int) -> Any:
        return Unet(
            dim=dim,
            cond_dim=dim,
            image_embed_dim=clip.dim_latent,
            text_embed_dim=clip.text_encodings.shape[2],
            channels=3,
            channels_out=6,
            dim_mults=_DIM_MULTS,
            resnet_groups=_RESNET_GROUPS,
            cond_on_image_embeds=True,
            cond_on_text_encodings=True,
            max_text_len=clip.max_text_len,
        )

    with torch.device("meta"):
        widths = range(2 * _RESNET_GROUPS, _WIDEST, _RESNET_GROUPS)
        width = min(widths, key=lambda dim: abs(parameter_count(unet(dim)) - parameters))
    return Decoder(
        unet(width),
        clip=clip,
        image_sizes=(clip.image_size,),
        timesteps=DECODER_TIMESTEPS,
        sample_timesteps=steps,
        image_cond_drop_prob=0.1,
        text_cond_drop_prob=0.5,
        **DECODER[settings],
    )


def build(clip: Embedded, arguments: argparse.Namespace) -> tuple[Any, Any, Accelerator]:
    """Prior and decoder with random weights, and what runs them."""
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior = build_prior(clip, arguments.prior_parameters).to(device)
    decoder = build_decoder(clip, arguments.decoder_parameters, arguments.settings, arguments.steps).to(device)
    return prior, decoder, Accelerator(cpu=device == "cpu", mixed_precision=arguments.precision)


def train_for(seconds: float, count: int, batch: int, step: Callable[[torch.Tensor], float]) -> dict[str, Any]:
    """Steps on batches of the records' numbers, shuffled anew in every epoch, until the time is over."""
    rng = np.random.default_rng(0)
    started, steps, losses, left = time.perf_counter(), 0, [], np.zeros(0, np.int64)
    while (taken := time.perf_counter() - started) < seconds:
        if len(left) < batch:
            left = np.concatenate([left, rng.permutation(count)])
        rows, left = left[:batch], left[batch:]
        losses.append(step(torch.from_numpy(rows)))
        steps += 1
    return {
        "seconds": taken,
        "steps": steps,
        "samples": steps * batch,
        "loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
    }


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both, one after the other, each for its time."""
    tensors = load_file(arguments.folder / "train.safetensors")
    clip = Embedded(tensors["text_embed"], tensors["text_states"], arguments.image_size)
    prior, decoder, accelerator = build(clip, arguments)
    prior_trainer = DiffusionPriorTrainer(prior, accelerator=accelerator, **TRAINER)
    decoder_trainer = DecoderTrainer(decoder, accelerator=accelerator, **TRAINER)
    device, image_embed = accelerator.device, tensors["image_embed"].float()
    pictures = tensors["image"].permute(0, 3, 1, 2)

    def prior_step(rows: torch.Tensor) -> float:
        loss = prior_trainer(text=rows[:, None].to(device), image_embed=image_embed[rows].to(device))
        prior_trainer.update()
        return loss

    def decoder_step(rows: torch.Tensor) -> float:
        loss = decoder_trainer(
            pictures[rows].to(device).float() / 255,
            text=rows[:, None].to(device),
            image_embed=image_embed[rows].to(device),
            unet_number=1,
        )
        decoder_trainer.update(1)
        return loss

    count = len(pictures)
    found = {
        "prior": train_for(arguments.prior_seconds, count, arguments.prior_batch, prior_step),
        "decoder": train_for(arguments.decoder_seconds, count, arguments.decoder_batch, decoder_step),
    }
    networks = {"prior": prior_trainer.ema_diffusion_prior.ema_model.net, "decoder": decoder_trainer.unets[0]}
    for name, file in (("prior", _PRIOR), ("decoder", _DECODER)):
        found[name]["parameters"] = parameter_count(networks[name])
        save_model(networks[name].cpu(), str(arguments.out / file))
    about = {"version": version("dalle2-pytorch"), "settings": arguments.settings, "precision": arguments.precision}
    return found | about


def sample(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pictures of each caption by `DALLE2`, each of the better of two image embeddings, as uint8 (N, S, S, 3)."""
    tensors = load_file(arguments.folder / "captions.safetensors")
    clip = Embedded(tensors["text_embed"], tensors["text_states"], arguments.image_size)
    prior, decoder, accelerator = build(clip, arguments)
    load_model(prior.net, str(arguments.out / _PRIOR))
    load_model(decoder.unets[0], str(arguments.out / _DECODER))
    dalle2 = DALLE2(prior=prior, decoder=decoder).eval()
    numbers = torch.arange(len(tensors["text_embed"])).repeat_interleave(arguments.pictures)
    started, parts = time.perf_counter(), []
    with accelerator.autocast():
        for rows in numbers.split(arguments.at_once):
            drawn = dalle2(rows[:, None].to(accelerator.device), cond_scale=GUIDANCE_SCALE)
            drawn = drawn.reshape(len(rows), *drawn.shape[-3:])  # of one caption it gives a picture without a batch
            parts.append((255 * drawn.float().clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    taken = time.perf_counter() - started
    save_file({"image": torch.cat(parts).contiguous()}, arguments.out / "pictures.safetensors")
    return {"seconds_per_picture": taken / len(numbers), "steps": arguments.steps, "guidance_scale": GUIDANCE_SCALE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("train", "sample"))
    parser.add_argument("folder", type=Path, help="with train.safetensors and captions.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is trained and drawn")
    parser.add_argument("--settings", choices=DECODER, default="readme")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="accelerate's mixed precision")
    parser.add_argument("--prior-parameters", type=int, required=True)
    parser.add_argument("--decoder-parameters", type=int, required=True)
    parser.add_argument("--prior-seconds", type=float, default=0.0)
    parser.add_argument("--decoder-seconds", type=float, default=0.0)
    parser.add_argument("--prior-batch", type=int, default=128)
    parser.add_argument("--decoder-batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=DECODER_STEPS, help="of the decoder's sampling")
    parser.add_argument("--pictures", type=int, default=1, help="of each caption")
    parser.add_argument("--at-once", type=int, default=16, help="pictures in a batch")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {"train": train, "sample": sample}[arguments.task](arguments)
    (arguments.out / f"{arguments.task}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
