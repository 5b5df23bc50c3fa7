"""A generation job before and after its work: what is checked first, what is to be made, and what there is at the end.

>>> job = BulkJob.prepare(config)
>>> maker = PictureMaker(job.config)
>>> maker.setup()
>>> for unit in job.begin():
...     maker.process(unit)
>>> job.finish()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unclip.config.base import ConfigError
from unclip.data.manifest import DataError
from unclip.generation.bulk.config import GenerateConfig
from unclip.generation.bulk.folder import SHEET, OutputFolder
from unclip.generation.bulk.prompts import PromptList, Unit, list_prompts, read_unit
from unclip.generation.bulk.receipts import Receipt
from unclip.generation.bulk.rows import Judge, Refused
from unclip.generation.bulk.sheet import sample_sheet
from unclip.generation.outputs import write_grid
from unclip.pipelines.bundle import Bundle
from unclip.pipelines.cascade import Cascade, plan_cascade
from unclip.utils import storage


@dataclass(frozen=True)
class BulkJob:
    """A generation whose inputs were all found right.

    Args:
        config: with absolute addresses.
        cascade: of its options, which are those of rows that say nothing else.
    """

    config: GenerateConfig
    bundle: Bundle
    cascade: Cascade
    prompts: PromptList
    folder: OutputFolder

    @classmethod
    def prepare(cls, config: GenerateConfig) -> BulkJob:
        """Checks everything that can be checked without weights; nothing is written that stays.

        Raises `ConfigError` for a bad field, a bad `prompt`, or an `out` that was begun with other settings; `BundleError`
        for a bad bundle, `DataError` for a list that cannot be read, and `OSError` where `out` cannot be written.
        """
        for name in ("bundle", "out"):
            if not getattr(config, name):
                raise ConfigError(f"{name}: required, but not given")
        addresses = {name: storage.absolute(getattr(config, name)) for name in ("bundle", "out")}
        if config.prompts is not None:
            addresses["prompts"] = storage.absolute(config.prompts)
        config = config.merged(addresses)
        bundle = Bundle.load(config.bundle)
        cascade = plan_cascade(bundle.configs, config.options)
        if config.best_of is not None and bundle.clip is None:
            raise ConfigError(f"best_of = {config.best_of}: the bundle has no CLIP to find the best with")
        prompts = list_prompts(config)
        _check_prompt(config, bundle, prompts)
        identity = {"bundle": bundle.digest, "config": config.content, "prompts": prompts.identity}
        folder = OutputFolder(config.out, identity, tuple(cascade.sizes.values()) if config.format == "folder" else ())
        storage.check_writable(config.out)
        folder.check_same()
        return cls(config, bundle, cascade, prompts, folder)

    def begin(self) -> list[Unit]:
        """Marks the folder as this job's, and says which units are to be made."""
        self.folder.begin()
        done = self.receipts()
        missing = [unit for unit in self.prompts.units if unit.index not in done]
        if missing:
            self.folder.reopen()
        return missing

    def receipts(self) -> dict[int, Receipt]:
        """Of the units that are done, by their numbers; what they name is there."""
        return self.folder.receipts(self.prompts.units)

    def finish(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Once all units are made: writes grid.png and, last, the manifest, which it returns.

        Raises `DataError` where units are not there, or the counts do not add up.

        Args:
            extra: what else the manifest shall say, as JSON values.
        """
        receipts = self.receipts()
        absent = [unit.index for unit in self.prompts.units if unit.index not in receipts]
        if absent:
            raise DataError(
                f"{self.config.out!r}: {len(absent)} of {len(self.prompts.units)} units are not there, the first {absent[0]}"
            )
        manifest = (
            self.folder.finish(receipts, self.prompts.rows) | {"settings": self.cascade.settings} | dict(extra or {})
        )
        sheet = sample_sheet(self.config.out, [receipts[unit] for unit in sorted(receipts)], self.folder.sizes)
        if sheet is not None:
            write_grid(sheet, storage.join(self.config.out, SHEET))
        self.folder.write_manifest(manifest)
        return manifest


def _check_prompt(config: GenerateConfig, bundle: Bundle, prompts: PromptList) -> None:
    """What a job of one prompt would quarantine is an error; a list's rows are judged where they are made."""
    judge = Judge(config, bundle.configs)
    if config.prompt is None:
        return
    (record,) = read_unit(config, prompts.units[0])
    judged = judge.judge(0, record)
    if isinstance(judged, Refused):
        raise ConfigError(f"prompt = {config.prompt[:60]!r}: {judged.detail}")
