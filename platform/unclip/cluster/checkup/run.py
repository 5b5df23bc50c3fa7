"""A checkup from its settings to its report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unclip.cluster import preflight, session
from unclip.cluster.checkup import room, versions
from unclip.cluster.checkup.checks import CHECKS, Checkup
from unclip.cluster.checkup.config import CheckName, CheckupConfig
from unclip.cluster.checkup.nodes import Place, Probes, living_places
from unclip.cluster.checkup.result import Finding, Result, failed
from unclip.cluster.failures import describe
from unclip.config.base import ConfigError
from unclip.pipelines.stages import StageName
from unclip.training.config import TrainConfig
from unclip.utils import storage

RecipeTables = Mapping[StageName, Mapping[str, Callable[[], TrainConfig]]]
"""Recipes by stage and name."""
PINS = "requirements.txt"


def settle(config: CheckupConfig, recipes: RecipeTables, folder: Path) -> CheckupConfig:
    """The settings with an absolute storage, and with the pins that lie in `folder` where none are named.

    Raises `ConfigError` where something is missing or cannot be meant.
    """
    if not config.storage:
        raise ConfigError("storage: required, but not given")
    if not config.checks:
        raise ConfigError("checks = []: name one at least")
    if config.stage and (config.gpus or config.cpus):
        raise ConfigError(f"stage = {config.stage!r}: its recipe says how many GPUs and CPUs; leave gpus and cpus out")
    session.refuse_lost_paths({"storage": config.storage, "report": config.report})
    planned_run(config, recipes)
    beside = str(folder / PINS)
    pins = config.requirements or (beside if storage.exists(beside) else "")
    if pins and not storage.exists(pins):
        raise ConfigError(f"requirements = {pins!r}: there is no such file")
    if config.report:  # which comes last, after checks that take minutes
        try:
            storage.check_writable(os.path.dirname(storage.absolute(config.report)))
        except OSError as error:
            raise ConfigError(f"report = {config.report!r}: {error}") from None
    return config.merged({"storage": storage.absolute(config.storage), "requirements": pins})


def planned_run(config: CheckupConfig, recipes: RecipeTables) -> TrainConfig | None:
    """The run that shall fit, if any. Raises `ConfigError` naming the field that describes none."""
    if config.stage is None:
        return None
    table = recipes[config.stage]
    if config.recipe not in table:
        raise ConfigError(f"recipe = {config.recipe!r}: {config.stage} has {', '.join(table)}")
    try:
        return table[config.recipe]().override(config.settings)
    except ConfigError as error:
        raise ConfigError(f"settings: {error}") from None


def run_checkup(config: CheckupConfig, recipes: RecipeTables) -> Iterator[list[Result]]:
    """What each check finds, as they end; `config` is one that `settle` returned.

    What a check writes is deleted, and what it claims given back, at its end.
    """
    run = planned_run(config, recipes)
    with session.session():
        demand = room.demand_of(config, run, preflight.cluster_nodes())
        refusal = room.bring_up(demand, config.wait_s) if demand else ""
        places, found = living_places(), []
        with Probes(places, config.limit_s) as probes:
            checkup = Checkup(
                config,
                probes,
                labels=run.resources.node_labels if run else config.node_labels,
                demand=demand,
                placement=run.resources.placement if run else "PACK",
                refusal=refusal,
                trial=recipes["decoder"]["glide_debug"](),  # draws from a caption: one stage is a bundle
            )
            for name in config.checks:
                results = _results_of(name, checkup)
                found += results
                yield results
        if config.report:
            storage.write_json(config.report, _report(config, places, found))


def _results_of(name: CheckName, checkup: Checkup) -> list[Result]:
    """Whatever breaks in a check is its failure, since nothing has shown that the cluster is fit; the others run all the same."""
    findings: list[tuple[str, Finding]] = []
    started = time.monotonic()
    try:
        findings += CHECKS[name](checkup)
    except Exception as error:
        findings.append(("", failed(f"the check broke off: {describe(error).splitlines()[0]}", "see Ray's logs")))
    seconds = round(time.monotonic() - started, 2)
    return [Result(**asdict(finding), check=name, node=node, seconds=seconds) for node, finding in findings]


def _report(config: CheckupConfig, places: Sequence[Place], results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was found, as JSON."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "unclip": versions.sources_hash(),
        "config": config.to_dict(),
        "nodes": [asdict(place) for place in places],
        "results": [asdict(result) for result in results],
    }
