"""The comparison of chains runs from embeddings to judged pictures, and the peer draws what it has learned."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.chain.__main__ import OURS, main, run_peer
from safetensors.torch import load_file, save_file
from torch.nn import functional

from unclip.generation.outputs import decode_png
from unclip.models.text import caption_mask
from unclip.pipelines.bundle import Bundle, ClipReference, save_stage
from unclip.pipelines.stages import stage_config_from_dict
from unclip.recipes.clip import tiny_architecture

PEER = Path(os.environ.get("PEER", "/tmp/d2p")) / "bin" / "python"


def save_clip(bundle: Path, seed: int) -> None:
    """A CLIP with random weights of the size that the debug recipes expect."""
    config = stage_config_from_dict({"kind": "clip", "architecture": tiny_architecture().to_dict()})
    torch.manual_seed(seed)
    model = config.build()
    reference = ClipReference(source="clip", fingerprint=str(model.fingerprint))
    save_stage(str(bundle), config, tensors=model.state_dict(), clip=reference, provenance={})


def test_our_side_runs_alone_through_every_phase(records: str, more_records: str, tmp_path: Path) -> None:
    """With CLIPs and records that are there, as from an earlier call; what was done is not done again."""
    folder = tmp_path / "chain"
    for name, seed in (("bundle", 0), ("judge", 1)):
        save_clip(folder / name, seed)
    for split, source in (("train", records), ("heldout", more_records), ("compositional", more_records)):
        shutil.copytree(source, folder / "openmoji" / "64" / split)
    (folder / "clip.json").write_text("{}")
    settings = ["--recipe", "debug", "--seconds", "4", "--prior-share", "0.5", "--captions", "9", "--pictures", "2"]
    command = [*settings, "--folder", str(folder), "--results", str(tmp_path / "results")]
    main(command)

    (file,) = (tmp_path / "results").glob("chain-*.json")
    phases = json.loads(file.read_text())["phases"]
    assert phases[f"train {OURS}"].keys() >= {"prior", "decoder"}
    for stage in ("prior", "decoder"):
        trained = phases[f"train {OURS}"][stage]
        model = Bundle.load(str(folder / "bundle")).load_model(stage)
        weights = sum(parameter.numel() for parameter in model.parameters())
        assert trained["with_vocabulary"] == weights
        assert trained["parameters"] == weights - 49408 * (32 if stage == "prior" else 16)
        assert trained["samples"] == 4 * trained["steps"] > 0
    judged = phases["judge"]["sides"][OURS]
    assert judged["clip"]["clip_score"]["pictures"] == 18
    assert judged["clip"]["frechet_distance"] != judged["other_clip"]["frechet_distance"] > 0
    assert decode_png((folder / "grid.png").read_bytes()).std() > 0

    clip = Bundle.load(str(folder / "bundle")).load_clip()
    tensors = load_file(folder / "train.safetensors")
    tokens = clip.tokenize([f"drawing number {number}" for number in range(120)])
    embeds, states = clip.encode_text_states(tokens)
    mask = caption_mask(tokens)
    torch.testing.assert_close(tensors["text_embed"].float(), embeds, atol=2e-3, rtol=0)
    torch.testing.assert_close(tensors["text_states"].float()[mask], states[mask], atol=2e-2, rtol=0)
    assert not tensors["text_states"][~mask].any()
    assert tensors["image"].shape == (120, 64, 64, 3)

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    main(command)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    for more, said in (["--captions", "8"], "captions = 8: .* was begun with 9"), (["--peer-python", "x"], "sides = "):
        with pytest.raises(SystemExit, match=said):
            main([*command, *more])


@pytest.mark.skipif(not PEER.exists(), reason=f"no environment of dalle2-pytorch at {PEER}; see benchmarks/README.md")
def test_the_peer_trains_for_its_time_and_draws_its_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though this process has trained before, and DeepSpeed left its rank in the environment."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = torch.Generator().manual_seed(0)

    def unit(count: int) -> torch.Tensor:
        return functional.normalize(torch.randn(count, 16, generator=rows), dim=1)

    pictures = torch.randint(256, (12, 64, 64, 3), dtype=torch.uint8, generator=rows)
    states = torch.randn(12, 8, 16, generator=rows)
    records = {"image": pictures, "image_embed": unit(12), "text_embed": unit(12), "text_states": states}
    save_file(records, tmp_path / "train.safetensors")
    save_file({"text_embed": unit(3), "text_states": states[:3].clone()}, tmp_path / "captions.safetensors")
    sizes = ["--prior-parameters", "30000", "--decoder-parameters", "1600000"]
    times = ["--prior-seconds", "1", "--decoder-seconds", "1", "--prior-batch", "4", "--decoder-batch", "2"]
    for task in ("train", "sample"):
        options = [*sizes, *times, "--out", str(tmp_path / "peer"), "--steps", "3", "--pictures", "2"]
        run_peer(str(PEER), [task, str(tmp_path), *options])
    trained = json.loads((tmp_path / "peer" / "train.json").read_text())
    assert trained["prior"]["parameters"] == pytest.approx(30000, rel=0.2)
    assert trained["decoder"]["parameters"] == pytest.approx(1600000, rel=0.2)
    assert trained["prior"]["seconds"] >= 1
    assert trained["decoder"]["samples"] == 2 * trained["decoder"]["steps"] > 0
    drawn = load_file(tmp_path / "peer" / "pictures.safetensors")["image"].numpy()
    assert drawn.shape == (6, 64, 64, 3)
    assert drawn.dtype == np.uint8
    assert drawn.std() > 0
