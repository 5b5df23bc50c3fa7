"""A judge from records: its folds, a network for each, and how well each judges the pictures that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unclip.config.base import ConfigError
from unclip.evaluation.judge.accuracy import all_right, best_constant
from unclip.evaluation.judge.config import TrainJudgeConfig
from unclip.evaluation.judge.examples import UNKNOWN, Examples, Labels, read_examples
from unclip.evaluation.judge.folder import (
    FACTS_FILE,
    Judge,
    KnownCaptions,
    load_network,
    network_file,
    save_judge,
    save_network,
)
from unclip.evaluation.judge.learning import train_network
from unclip.evaluation.judge.network import as_ink
from unclip.utils import storage
from unclip.utils.progress import progress_bar

_CONFIG = "config.json"
_BATCH = 256


def train_judge(config: TrainJudgeConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Trains the networks that are missing and returns what judge.json says; a dry run checks everything and returns the
    `classes` and the numbers of `pictures` and `captions`.

    Raises `ConfigError` for a bad field or a folder begun with another configuration, `DataError` for records that cannot
    be used, `OSError` where `out` cannot be written.
    """
    if not config.out:
        raise ConfigError("out: required, but not given")
    config = config.merged(
        {"out": storage.absolute(config.out), "records": [storage.absolute(uri) for uri in config.records]}
    )
    _check_device(config.device)
    examples = read_examples(config)
    begun = {**config.to_dict(), "records": list(examples.sources)}
    begun = {name: value for name, value in begun.items() if name not in ("out", "device")}
    storage.check_writable(config.out)
    _check_same(config.out, begun)
    if dry_run:
        return {
            "classes": examples.classes,
            "pictures": len(examples.pictures),
            "captions": len(set(examples.captions)),
        }
    if storage.exists(storage.join(config.out, FACTS_FILE)):
        return dict(Judge.load("out", config.out).facts)
    storage.write_json(storage.join(config.out, _CONFIG), begun)
    _train_missing(examples, config)
    answers = _answers(examples, config)
    facts = {
        "config": begun,
        "classes": {name: list(classes) for name, classes in examples.classes.items()},
        "pictures": len(examples.pictures),
        "not_judged": _not_judged(examples),
        "accuracy": accuracy_on_real(examples, answers),
    }
    return dict(save_judge(config.out, _known_captions(examples, answers), facts).facts)


def accuracy_on_real(examples: Examples, answers: Labels) -> dict[str, dict[str, float]]:
    """Of each attribute, and `all`: shares of the real pictures that were judged right, each by the network that had not
    seen it.

    `pictures` that state the attribute, `right`: the share found; `constant`: the share that one constant answer would
    get; `none_right`: the share of those without the attribute of which it is said that they have none.
    """
    stated = np.where(examples.is_stated, examples.labels, UNKNOWN)
    is_none = (examples.labels != UNKNOWN) & ~examples.is_stated
    found = {
        name: _shares(stated[:, [index]], answers[:, [index]])
        | _share("none_right", (answers == examples.labels)[is_none[:, index], index])
        for index, name in enumerate(examples.classes)
    }
    return found | {"all": _shares(stated, answers)}


def _shares(stated: Labels, answers: Labels) -> dict[str, float]:
    says = (stated != UNKNOWN).any(axis=1)
    right = all_right(stated[says], answers[says])
    return {"pictures": len(right), **_share("right", right), "constant": best_constant(stated[says])}


def _share(name: str, is_right: npt.NDArray[np.bool_]) -> dict[str, float]:
    return {name: float(is_right.mean())} if len(is_right) else {}


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # what torch says of a device that is not there
        raise ConfigError(f"device = {device!r}: {str(error).splitlines()[0]}") from None


def _check_same(uri: str, begun: Mapping[str, Any]) -> None:
    path = storage.join(uri, _CONFIG)
    found = storage.read_json(path) if storage.exists(path) else begun
    changed = [name for name, value in begun.items() if found.get(name) != value]
    if changed:
        was, now = found.get(changed[0]), begun[changed[0]]
        raise ConfigError(f"out = {uri!r}: was begun with {changed[0]} = {was}, now it is {now}; choose another folder")


def _train_missing(examples: Examples, config: TrainJudgeConfig) -> None:
    missing = [fold for fold in range(config.folds) if network_file(fold) not in storage.names(config.out)]
    done = (config.folds - len(missing)) * config.steps
    with progress_bar(config.folds * config.steps, "step", done=done, title="judge") as bar:
        for fold in missing:
            save_network(config.out, fold, train_network(examples, fold, config, bar))


def _answers(examples: Examples, config: TrainJudgeConfig) -> Labels:
    """(N, attributes): what the network says of each picture that has not seen it."""
    answers = np.empty_like(examples.labels)
    for fold in range(config.folds):
        network = load_network(config.out, fold, examples.classes, config.width).to(config.device)
        rows = np.flatnonzero(examples.folds == fold)
        for start in range(0, len(rows), _BATCH):
            chosen = rows[start : start + _BATCH]
            logits = network(as_ink(examples.pictures[chosen]).to(config.device))
            answers[chosen] = torch.stack([of_attribute.argmax(1) for of_attribute in logits], dim=1).cpu().numpy()
    return answers


def _known_captions(examples: Examples, answers: Labels) -> KnownCaptions:
    """The captions that state an attribute; pictures of one caption that show different things leave it unknown."""
    stated = np.where(examples.is_stated, examples.labels, UNKNOWN)
    rows_of: dict[str, list[int]] = {}
    for row, caption in enumerate(examples.captions):
        rows_of.setdefault(caption, []).append(row)
    agreed = {
        caption: np.where((stated[rows] == stated[rows[0]]).all(axis=0), stated[rows[0]], UNKNOWN)
        for caption, rows in rows_of.items()
    }
    kept = [caption for caption, labels in agreed.items() if caption and (labels != UNKNOWN).any()]
    right = []
    for caption in kept:
        labels, said = agreed[caption], answers[rows_of[caption]]
        shares = np.where(labels == UNKNOWN, np.nan, (said == labels).mean(axis=0))
        right.append([*shares, all_right(np.broadcast_to(labels, said.shape), said).mean()])
    return KnownCaptions(
        rows={caption: row for row, caption in enumerate(kept)},
        folds=np.array([examples.folds[rows_of[caption][0]] for caption in kept]),
        stated=np.stack([agreed[caption] for caption in kept]),
        right=np.array(right),
    )


def _not_judged(examples: Examples) -> dict[str, list[str]]:
    """Values that too few drawings have, of each attribute that has such."""
    found = {
        name: [value for label, value in enumerate(classes) if label not in examples.labels[:, index]]
        for index, (name, classes) in enumerate(examples.classes.items())
    }
    return {name: values for name, values in found.items() if values}
