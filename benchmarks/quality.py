"""Quality against steps: what a bundle's decoder draws with each sampler, from the same captions, embeddings and noise.

    python -m benchmarks.quality --bundle BUNDLE --records RECORDS/heldout --results benchmarks/results

Each setting draws every caption of the records once, told the caption and the prior's z_i. What it drew stays in `--samples`, so
that settings may be drawn one by one, the slow ones of fewer captions, and a run that was ended goes on. With `REFERENCE` among
them, which needs as many captions as the others, there are figures:

- KID: the squared maximum mean discrepancy (Bińkowski et al. 2018) of samples and real pictures, here of the embeddings of the
  bundle's CLIP, with (1 + cosine)^3 as kernel. It has no bias, so that it does not fall with the number of samples as a Fréchet
  distance does; pairs of one caption are left out, as these are not independent.
- `kid_over_reference`: how much more than that of `REFERENCE`.
- CLIP-score: the mean cosine of the samples' embeddings and their captions'.
- `off_reference`: the mean difference of the pixels, of 255, to `REFERENCE` from the same x_T; of the samplers without noise.

Intervals are of 95%: captions drawn anew, the same ones for all settings, so that differences have theirs too. All is judged
by the CLIP that the decoder was trained with: it ranks samplers of one bundle, not bundles.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from benchmarks.common import machine, seconds, write_json

from unclip.data.decode import decode_image
from unclip.data.manifest import read_slices, scan
from unclip.data.transforms import resize_square
from unclip.models.clip import ClipModel
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline

REFERENCE = "ddim 250"
SETTINGS: dict[str, dict[str, Any]] = {
    REFERENCE: {"sampler": "ddim", "num_inference_steps": 250},
    "ddpm 250": {"sampler": "ddpm", "num_inference_steps": 250},
    "ddim 50": {"sampler": "ddim", "num_inference_steps": 50},
    "ddim 27": {"sampler": "ddim", "timestep_spacing": "fast27", "num_inference_steps": 27},
    "dpmsolver++ 20": {"sampler": "dpmsolver++", "num_inference_steps": 20},
    "dpmsolver++ 15": {"sampler": "dpmsolver++", "num_inference_steps": 15},
    "dpmsolver++ 10": {"sampler": "dpmsolver++", "num_inference_steps": 10},
}
_AT_ONCE = 16
"""Pictures in a batch: more are slower where they leave a CPU's cache."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Records:
    """N captions, and their pictures uint8 (N, S, S, 3)."""

    captions: list[str]
    pictures: npt.NDArray[np.uint8]

    @classmethod
    def read(cls, uri: str, size: int) -> Records:
        manifest = scan(uri, ["image", "caption"])
        slices = [(index, 0, fragment.rows) for index, fragment in enumerate(manifest.fragments)]
        rows = read_slices(manifest, slices, ["image", "caption"]).to_pylist()
        pictures = np.stack([resize_square(decode_image(row["image"]), size) for row in rows])
        return cls([row["caption"] for row in rows], pictures)


def draw(pipeline: Pipeline, captions: Sequence[str], name: str, folder: Path) -> None:
    """Every caption with its place as seed, a file of pictures and seconds for each batch that `folder` does not have."""
    size = pipeline.decoder.config.image_size
    options = GenerationOptions(up_to=size).merged({"decoder": SETTINGS[name]})
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(captions), _AT_ONCE):
        file, part = folder / f"{start:05d}.npz", captions[start : start + _AT_ONCE]
        if file.exists():
            continue
        drawing, made = pipeline.draw(range(start, start + len(part)), options=options), []
        z_i = drawing.prior(part)
        taken = seconds(lambda: made.append(drawing.decode(prompts=part, image_embed=z_i)), pipeline.device)  # noqa: B023
        np.savez(file, pictures=made[0].cpu().numpy(), seconds=taken)
        print(f"{name}, {start}: {taken / len(part):.3f} s a picture", flush=True)


def drawn_in(folder: Path) -> tuple[npt.NDArray[np.uint8], float]:
    """The pictures of all batches, uint8 (N, S, S, 3), and the seconds of a picture in the fastest full batch."""
    parts = [np.load(file) for file in sorted(folder.glob("*.npz"))]
    full = [part for part in parts if len(part["pictures"]) == _AT_ONCE] or parts
    fastest = min(float(part["seconds"]) / len(part["pictures"]) for part in full)
    return np.concatenate([part["pictures"] for part in parts]), fastest


def embeds(clip: ClipModel, pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
    """(B, D) float64 on the CPU."""
    parts = [clip.encode_image(pictures[start : start + 64]).cpu() for start in range(0, len(pictures), 64)]
    return torch.cat(parts).double()


def resamples(count: int) -> torch.Tensor:
    """(1 + R, N): how often each caption counts; the first row is each of them once."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return torch.from_numpy(np.concatenate([np.ones((1, count)), drawn])).double()


def kid(ours: torch.Tensor, real: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(R,): KID of samples and pictures (N, D), unit norm, for each row of `weights` (R, N) of the captions."""
    return _pairs(ours, ours, weights) + _pairs(real, real, weights) - 2 * _pairs(ours, real, weights)


def _pairs(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean kernel of row i of `a` and row j of `b` over i != j, weighted."""
    kernel = (1 + a @ b.T) ** 3
    kernel.fill_diagonal_(0)
    pairs = weights.sum(dim=1).square() - weights.square().sum(dim=1)
    return torch.einsum("ri,ij,rj->r", weights, kernel, weights) / pairs


def interval(values: torch.Tensor) -> dict[str, float]:
    """The first of `values` (1 + R,), which is of all captions, and what 95% of the others lie between."""
    low, high = torch.quantile(values[1:], torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return {"value": float(values[0]), "low": low, "high": high}


def judged(pipeline: Pipeline, records: Records, drawn: dict[str, npt.NDArray[np.uint8]]) -> dict[str, Any]:
    """The figures of what each setting drew, uint8 (n, S, S, 3) of the first n captions, and of the real pictures."""
    assert pipeline.clip is not None
    real, z_t = embeds(pipeline.clip, records.pictures), pipeline.encode_text(records.captions).cpu().double()
    reference = embeds(pipeline.clip, drawn[REFERENCE])
    weights = resamples(len(real))
    found: dict[str, Any] = {"real": {"clip_score": interval(weights @ (real * z_t).sum(dim=1) / len(real))}}
    for name, pictures in drawn.items():
        count, z_i = len(pictures), embeds(pipeline.clip, pictures)
        weights = resamples(count)
        distance = kid(z_i, real[:count], weights)
        off = np.abs(pictures.astype(np.int16) - drawn[REFERENCE][:count]).mean()
        found[name] = {
            "captions": count,
            "kid": interval(distance),
            "kid_over_reference": interval(distance - kid(reference[:count], real[:count], weights)),
            "clip_score": interval(weights @ (z_i * z_t[:count]).sum(dim=1) / count),
            "off_reference": float(off) if SETTINGS[name]["sampler"] != "ddpm" else None,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--records", required=True, help="folder of records: their captions and pictures")
    parser.add_argument("--captions", type=int, help="how many, the first ones; all unless given")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--samples", type=Path, default=Path("runs/benchmarks/quality"))
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bundle = Bundle.load(arguments.bundle)
    pipeline = Pipeline.from_bundle(bundle, device)
    records = Records.read(arguments.records, pipeline.decoder.config.image_size)
    folder: Path = arguments.samples / f"{bundle.digest[:12]}-{len(records.captions)}"
    for name in arguments.settings:
        draw(pipeline, records.captions[: arguments.captions], name, folder / name)
    if REFERENCE not in arguments.settings:
        return
    made = {name: drawn_in(folder / name) for name in arguments.settings}
    found = judged(pipeline, records, {name: pictures for name, (pictures, _) in made.items()})
    for name, (_, taken) in made.items():
        found[name]["seconds_per_picture"] = taken
        print(name, found[name], flush=True)
    about = {"machine": machine(device), "bundle": bundle.digest, "captions": len(records.captions)}
    file = arguments.results / f"quality-{datetime.date.today().isoformat()}.json"
    write_json(file, {**about, "size": pipeline.decoder.config.image_size, "settings": found})


if __name__ == "__main__":
    main()
