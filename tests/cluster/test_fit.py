"""Whole runs through Ray Data, Ray Train and DeepSpeed, on real drawings: the chain, one worker and two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unclip.cluster.embed import EmbedConfig, run_embed
from unclip.cluster.fit import check, fit
from unclip.cluster.preflight import PreflightError
from unclip.models.clip import load_clip
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import GenerationOptions
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.stages import StageName
from unclip.recipes import RECIPES
from unclip.training.config import TrainConfig
from unclip.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def chain(openmoji: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle whose clip was trained, and the drawings embedded by it."""
    folder = tmp_path_factory.mktemp("chain")
    fit(debug("clip", folder, f"{openmoji}/64/train"))
    records, clip = f"{openmoji}/64/train", f"{folder}/bundle/clip"
    run_embed(EmbedConfig(data=records, out=f"{folder}/embedded", clip=clip, text_states=True))
    return folder


def debug(stage: StageName, folder: Path, data: str, **changes: Any) -> TrainConfig:
    places = {"run": f"{folder}/{stage}", "bundle": f"{folder}/bundle", "clip": None, "data": {"path": data}}
    return RECIPES[stage]["debug"]().merged(places).merged(changes)


def losses(config: TrainConfig) -> np.ndarray[Any, Any]:
    return np.array([record["loss"] for record in RunFolder(config.run).metrics()])


def test_the_chain_ends_with_pictures(chain: Path, openmoji: str) -> None:
    fit(debug("prior", chain, f"{chain}/embedded"))
    fit(debug("decoder", chain, f"{chain}/embedded"))
    summary = fit(debug("upsampler_256", chain, f"{openmoji}/256/train"))
    assert summary["step"] == 2
    assert set(Bundle.load(f"{chain}/bundle").configs) == {"clip", "prior", "decoder", "upsampler_256"}
    options = GenerationOptions(up_to=256)
    pictures = Pipeline.from_bundle(f"{chain}/bundle", "cpu", options=options)(["a heart"], [0], options=options).images
    assert {size: array.shape for size, array in pictures.items()} == {64: (1, 64, 64, 3), 256: (1, 256, 256, 3)}


def test_a_finished_run_is_not_trained_again(chain: Path, openmoji: str) -> None:
    config = debug("clip", chain, f"{openmoji}/64/train")
    before = RunFolder(config.run).summary()
    assert fit(config) == before


def test_two_workers_give_the_loss_curve_of_one(chain: Path) -> None:
    curves = []
    for workers in (1, 2):
        config = debug(
            "decoder",
            chain,
            f"{chain}/embedded",
            run=f"{chain}/decoder-{workers}-workers",
            bundle=None,
            loop={"max_steps": 6, "checkpoint_every_s": 600.0},
            resources={"num_workers": workers},
        )
        fit(config)
        curves.append(losses(config))
    assert len(curves[0]) == 6
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def test_embeddings_made_in_the_stream_equal_those_in_columns(chain: Path, openmoji: str) -> None:
    """z_i and the text states, of a decoder that takes both."""
    clip = load_clip(f"{chain}/bundle/clip")
    states = {"context_length": clip.context_length, "state_dim": clip.text_state_dim, "width": 32}
    curves = []
    for embeddings, data in (("columns", f"{chain}/embedded"), ("stream", f"{openmoji}/64/train")):
        config = debug(
            "decoder",
            chain,
            data,
            run=f"{chain}/decoder-{embeddings}",
            bundle=None,
            clip=f"{chain}/bundle/clip",
            objective={"stage": {"model": {"text": None, "text_states": states}}},
        ).merged({"data": {"embeddings": embeddings}})
        fit(config)
        curves.append(losses(config))
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


def test_too_many_workers_are_refused_before_anything_is_there(chain: Path, openmoji: str) -> None:
    config = debug(
        "upsampler_256",
        chain,
        f"{openmoji}/256/train",
        run=f"{chain}/refused",
        loop={"global_batch_size": 32, "microbatch_size": 1},
        resources={"num_workers": 32},
    )
    with pytest.raises(PreflightError, match=r"32 workers x 1 CPUs.*\n.*\n.*resources\.num_workers="):
        check(config)
    assert not Path(config.run, "config.json").exists()
