"""Quality against steps: what a bundle's decoder draws with each sampler, from the same embeddings, captions and seeds.

    python -m benchmarks.quality --bundle BUNDLE --records RECORDS/heldout --count 32 --results benchmarks/results

Two figures of each setting. CLIP-score: the mean cosine of the samples' embeddings and their captions', by the bundle's CLIP.
Fréchet distance: that of two Gaussians with the mean and covariance of the samples' and of the real pictures' embeddings in
the same space. It falls with the number of samples, so it compares settings of one run and nothing else; and both are judged
by the CLIP that the decoder was trained with. `real` is what the records' own pictures have. Settings that are measured again
replace those of the same day's file.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.common import machine, seconds, write_json

from unclip.data.decode import decode_image
from unclip.data.manifest import read_slices, scan
from unclip.data.transforms import resize_square
from unclip.models.clip import ClipModel
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline

SETTINGS: dict[str, dict[str, Any]] = {
    "ddpm 250": {"sampler": "ddpm", "num_inference_steps": 250},
    "ddim 50": {"sampler": "ddim", "num_inference_steps": 50},
    "ddim 27": {"sampler": "ddim", "timestep_spacing": "fast27", "num_inference_steps": 27},
    "dpmsolver++ 20": {"sampler": "dpmsolver++", "num_inference_steps": 20},
    "dpmsolver++ 15": {"sampler": "dpmsolver++", "num_inference_steps": 15},
    "dpmsolver++ 10": {"sampler": "dpmsolver++", "num_inference_steps": 10},
}


def records(uri: str, size: int) -> tuple[list[str], np.ndarray]:
    """Captions, and pictures uint8 (N, size, size, 3), of all records."""
    manifest = scan(uri, ["image", "caption"])
    slices = [(index, 0, fragment.rows) for index, fragment in enumerate(manifest.fragments)]
    rows = read_slices(manifest, slices, ["image", "caption"]).to_pylist()
    return [row["caption"] for row in rows], np.stack([resize_square(decode_image(row["image"]), size) for row in rows])


def frechet(ours: torch.Tensor, real: torch.Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of (N, D) and (M, D) (Heusel et al. 2017, eq. 6)."""
    ours, real = ours.double(), real.double()
    covariances = [torch.cov(rows.T, correction=0) for rows in (ours, real)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    # The eigenvalues of C1 C2 are those of C1^(1/2) C2 C1^(1/2), which is symmetric.
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * shared
    return float((ours.mean(dim=0) - real.mean(dim=0)).square().sum() + spread)


def embeds(clip: ClipModel, pictures: np.ndarray) -> torch.Tensor:
    return torch.cat([clip.encode_image(pictures[start : start + 64]).cpu() for start in range(0, len(pictures), 64)])


def measure(bundle: str, uri: str, count: int, names: Sequence[str]) -> dict[str, Any]:
    """Each setting's figures, from the prior's embeddings of the first `count` captions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = Bundle.load(bundle).configs["decoder"].image_size  # type: ignore[union-attr]
    options = GenerationOptions(up_to=size)
    pipeline = Pipeline.from_bundle(bundle, device, options=options)
    captions, pictures = records(uri, size)
    captions, seeds = captions[:count], list(range(count))
    z_t, real = pipeline.encode_text(captions).cpu(), embeds(pipeline.clip, pictures)  # type: ignore[arg-type]
    z_i = pipeline.draw(seeds, options=options).prior(captions)
    found: dict[str, Any] = {"real": {"clip_score": float((real[:count] * z_t).sum(dim=1).mean())}}
    for name in names:
        draw, made = pipeline.draw(seeds, options=options.merged({"decoder": SETTINGS[name]})), []
        taken = seconds(lambda: made.append(draw.decode(prompts=captions, image_embed=z_i)), device)  # noqa: B023
        drawn = embeds(pipeline.clip, made[0].cpu().numpy())  # type: ignore[arg-type]
        found[name] = {
            "clip_score": float((drawn * z_t).sum(dim=1).mean()),
            "frechet": frechet(drawn, real),
            "seconds_per_picture": taken / count,
        }
        print(name, found[name], flush=True)
    return {"real_pictures": len(pictures), "count": count, "size": size, "settings": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--records", required=True, help="folder of records whose captions and pictures are taken")
    parser.add_argument("--count", type=int, default=32, help="samples of each setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    found = measure(arguments.bundle, arguments.records, arguments.count, arguments.settings)
    file = arguments.results / f"quality-{datetime.date.today().isoformat()}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"settings": {}}
    same = {key: before.get(key) for key in ("count", "size")} == {key: found[key] for key in ("count", "size")}
    found["settings"] = (before["settings"] if same else {}) | found["settings"]
    digest = Bundle.load(arguments.bundle).digest
    write_json(file, {"machine": machine(torch.device("cpu")), "bundle": digest, **found})


if __name__ == "__main__":
    main()
