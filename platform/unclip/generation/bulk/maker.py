"""What a process that makes pictures does: an engine in a thread, fed by units, which are committed one by one."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.feeding import Feeder
from unclip.generation.bulk.folder import OutputFolder
from unclip.generation.bulk.making import Tools, UnitWork
from unclip.generation.bulk.prompts import Unit
from unclip.generation.bulk.receipts import Receipt
from unclip.generation.bulk.rows import Judge
from unclip.generation.bulk.scores import Scorer
from unclip.generation.bulk.shards import PictureWriter, open_shard, picture_files, write_quarantine
from unclip.generation.device import DTYPES, chosen_device
from unclip.generation.engine.engine import Engine
from unclip.generation.engine.metrics import EngineMetrics
from unclip.generation.engine.request import Request
from unclip.generation.engine.route import Stages
from unclip.generation.engine.worker import EngineThread
from unclip.pipelines.bundle import Bundle, BundleError
from unclip.pipelines.cascade import plan_cascade
from unclip.pipelines.pipeline import Pipeline

_WINDOW_BYTES = 256 * 2**20
"""Pixels of a unit's pictures that are under way or wait for an earlier one."""
_WINDOW = (32, 512)
"""Least and most pictures of that."""
_ENCODERS = 4


class UnitFailed(RuntimeError):
    """Nothing can be made any more: the machine is broken, not the prompts."""


class PictureMaker:
    """Makes and commits units; `process` may be called from several threads, of which two keep the engine full.

    Picklable before `setup`.

    Args:
        config: that of the `BulkJob`, which has begun.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self._config = config

    def setup(self) -> None:
        """Loads the bundle and starts the engine.

        Raises `ConfigError` where the device is not there, `BundleError` where the bundle is not the one that `out` was
        begun with, and `EngineError` where memory does not hold a single picture.
        """
        config = self._config
        bundle, device = Bundle.load(config.bundle), chosen_device(config.device)
        cascade = plan_cascade(bundle.configs, config.options)
        sizes = tuple(cascade.sizes.values())
        self._probe = Request(prompt=(cascade.classes or ("a drawing",))[0], options=config.options)
        self._sizes = sizes
        self._folder = OutputFolder(config.out, {"bundle": bundle.digest}, sizes)
        if self._folder.begun_with("bundle") != bundle.digest:
            raise BundleError(f"{config.bundle!r} is not the bundle that {config.out!r} was begun with")
        pipeline = Pipeline.from_bundle(bundle, device, dtype=DTYPES[config.precision], options=config.options)
        clip = pipeline.clip
        if clip is None and bundle.clip is not None:
            clip = bundle.load_clip().to(device)
        window = min(max(_WINDOW_BYTES // sum(3 * side**2 for side in sizes), _WINDOW[0]), _WINDOW[1])
        self._engine = EngineThread(Engine(Stages.of(pipeline), config.engine), max_waiting=2 * window)
        self._tools = Tools(
            config=config,
            judge=Judge(config, bundle.configs),
            feeder=Feeder(self._engine),
            scorer=None if clip is None else Scorer(clip),
            encoders=ThreadPoolExecutor(min(_ENCODERS, os.cpu_count() or 1), thread_name_prefix="unclip-encoder"),
            window=window,
            bundle=bundle.digest,
        )

    def process(self, unit: Unit, on_picture: Callable[[], None] = lambda: None) -> Receipt:
        """Makes a unit; all of it is in `out` then, with its receipt.

        Raises `UnitFailed` where nothing can be made any more, `EngineStoppedError` where the engine has died, `DataError` where
        the list of prompts has changed, and `OSError` where the storage fails; making it again puts everything right.

        Args:
            on_picture: called in this thread once for each picture that was drawn, kept or not.
        """
        began = time.monotonic()
        work = UnitWork(self._tools, unit, on_picture)
        with self._writer(unit) as writer:
            work.run(writer)
            reasons = Counter(refused.reason for refused in work.refused)
            if reasons["failed"]:
                self._check_works(unit)
            quarantine = write_quarantine(self._config.out, unit.index, work.refused)
            stored = writer.finish()
        receipt = Receipt(
            unit=unit.index,
            rows=unit.rows,
            quarantined=dict(sorted(reasons.items())),
            seconds=round(time.monotonic() - began, 3),
            quarantine=quarantine,
            **work.counts,
            **stored,
        )
        self._folder.write_receipt(receipt)
        return receipt

    def metrics(self) -> EngineMetrics:
        """Of the engine, as of its last step."""
        return self._engine.metrics()

    @property
    def step_seconds(self) -> float:
        """How long the engine's step under way has taken by now: a device that hangs shows here. 0 between steps."""
        return self._engine.step_seconds

    def close(self) -> None:
        """Ends the threads; what is under way is given up."""
        self._engine.close()
        if self._tools.scorer is not None:
            self._tools.scorer.close()
        self._tools.encoders.shutdown()

    def _check_works(self, unit: Unit) -> None:
        """Prompts are to blame for what failed only where others can be made."""
        try:
            self._tools.feeder.alone(self._probe)
        except Exception as error:
            raise UnitFailed(f"unit {unit.index}: nothing can be made any more: {error}") from error

    @contextmanager
    def _writer(self, unit: Unit) -> Iterator[PictureWriter]:
        config, bundle = self._config, self._tools.bundle
        if config.format == "folder":
            yield picture_files(config.out, bundle=bundle, sizes=self._sizes, keeps_all=config.best_of is None)
            return
        with open_shard(config.out, unit.index, form=config.format, encoding=config.encoding, bundle=bundle) as shard:
            yield shard
