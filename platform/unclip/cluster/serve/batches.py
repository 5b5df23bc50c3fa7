"""Batches worked off on a Ray cluster: an actor for each, which outlives the processes that speak HTTP.

The actor is known by the batch's name in a namespace of its own, so that there is one in a cluster however many processes ask
for it. The bulk job runs in a task beside it, which dies with it and can be ended at any time. Where an actor dies, any
process that speaks HTTP starts the next one; where two clusters share a folder, the bulk job's lease keeps them apart.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray

from unclip.cluster.failures import describe, is_final
from unclip.cluster.generate import run_generate
from unclip.cluster.makers import DRIVER_FILE
from unclip.generation.bulk.config import GenerateConfig
from unclip.serving.batches.folder import BatchFolder
from unclip.serving.batches.work import BatchWork, JobRefusedError
from unclip.serving.config import ProvenanceConfig, ServeConfig
from unclip.serving.observe import logs
from unclip.serving.pictures.encoding import Encoder
from unclip.serving.pictures.provenance import Signer
from unclip.utils import storage

NAMESPACE = "unclip-batches"
_REST_S = 30.0
"""An actor that failed ends after so long, so that the next one does not fail at once."""


class RayBatchRunner:
    """Starts a batch's actor where there is none; needs a connection to Ray."""

    def __init__(self, config: ServeConfig) -> None:
        assert config.batches.folder is not None
        self._folder = storage.absolute(config.batches.folder)
        self._provenance = config.provenance

    def start(self, batch_id: str) -> None:
        options = {"namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True, "num_cpus": 0}
        actor = ray.remote(BatchActor).options(name=batch_id, **options)
        actor.remote(self._folder, batch_id, self._provenance)


class BatchActor:
    """Works off one batch, and ends."""

    def __init__(self, folder: str, batch_id: str, provenance: ProvenanceConfig) -> None:
        logs.configure()
        self._folder, self._id, self._provenance = folder, batch_id, provenance
        threading.Thread(target=self._work, name="batch").start()

    def _work(self) -> None:
        try:
            encoder = Encoder(Signer.from_config(self._provenance))
            BatchWork(BatchFolder(self._folder), self._id, RayMaking, encoder).run()
        except Exception as error:
            logs.event("batch_left", level=logging.ERROR, batch=self._id, error=error)
            time.sleep(_REST_S)
        ray.kill(ray.get_actor(self._id, namespace=NAMESPACE))


class RayMaking:
    """`run_generate` in a task."""

    def __init__(self, job: GenerateConfig) -> None:
        self._job = job
        self._task: Any = _generate.remote(job)

    def wait(self, seconds: float) -> bool:
        done, _ = ray.wait([self._task], timeout=seconds)
        if not done:
            return False
        try:
            ray.get(self._task)
        except Exception as error:
            if is_final(error) and not self._is_worked_at():
                raise JobRefusedError(describe(error)) from error
            raise
        return True

    def stop(self) -> None:
        ray.cancel(self._task, force=True)

    def _is_worked_at(self) -> bool:
        """Whether another driver has the folder, of an actor before this one perhaps: it will end."""
        return storage.exists(storage.join(self._job.out, DRIVER_FILE))


@ray.remote(num_cpus=0, max_retries=0)
def _generate(job: GenerateConfig) -> None:
    run_generate(job)
