"""A decoder that is told CLIP's text states, from records to a bundle: embedded with them, trained, exported, sampled."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.support.embedded import save_clip

from unclip.models.clip import load_clip
from unclip.models.decoder import DecoderModel
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.stages import DecoderStage, DecoderStageConfig
from unclip.recipes import RECIPES
from unclip.recipes.clip import tiny_architecture
from unclip.training.in_process import embed_here, local_batches
from unclip.training.loop import Trainer
from unclip.training.publish import publish
from unclip.training.run_folder import RunFolder
from unclip.training.setup import prepare_run
from unclip.utils.random import SampleGenerator


def test_a_decoder_trains_on_the_text_states(openmoji: str, tmp_path: Path) -> None:
    source = save_clip(str(tmp_path), tiny_architecture())
    clip = load_clip(source)
    data = embed_here(f"{openmoji}/64/train", str(tmp_path / "embedded"), source, text_states=True)
    states = {"context_length": clip.context_length, "state_dim": clip.text_state_dim, "width": 32}
    changes = {
        "run": str(tmp_path / "run"),
        "bundle": str(tmp_path / "bundle"),
        "clip": source,
        "data": {"path": data},
        "objective": {"stage": {"model": {"text": None, "text_states": states, "embed_dim": clip.embed_dim}}},
    }
    prepared = prepare_run(RECIPES["decoder"]["debug"]().merged(changes))
    batch = next(iter(local_batches(prepared)))
    _, expected = clip.encode_text_states(batch["tokens"])
    found = batch["text_states"].float().unflatten(1, expected.shape[1:])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)  # those of the tokens that give their mask

    RunFolder(prepared.config.run).open(prepared.config)
    trainer = Trainer(prepared.config, rank=0, device=torch.device("cpu"))
    assert trainer.train(local_batches(prepared))["step"] == prepared.config.loop.max_steps
    publish(prepared)

    bundle = Bundle.load(str(tmp_path / "bundle"))
    stage, model = bundle.configs["decoder"], bundle.load_model("decoder")
    assert isinstance(stage, DecoderStageConfig)
    assert isinstance(model, DecoderModel)
    tokens = clip.tokenize(["a red heart", "a blue square"])
    embeds, text_states = clip.encode_text_states(tokens)
    streams = SampleGenerator.for_samples(0, torch.tensor([1, 2]))
    pictures = DecoderStage(stage, model).sample(
        embeds, tokens, streams, sampling=stage.sampling, further={"text_states": text_states}
    )
    assert pictures.shape == (2, 3, stage.image_size, stage.image_size)
