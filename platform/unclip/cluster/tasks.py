"""Work on a cluster that is done once: tasks whose results are files, and tables dealt out among tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from unclip.utils import storage

_READ_THREADS = 32

Facts = dict[str, Any]


class Ledger:
    """What tasks of one kind have committed: a small JSON file each, written when their other files are there.

    Args:
        folder: where those files are.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        names = [name for name in storage.names(folder) if name.endswith(".json")]
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            found = threads.map(lambda name: storage.read_json(storage.join(folder, name)), names)
            self.facts: dict[str, Facts] = dict(zip((name.removesuffix(".json") for name in names), found, strict=True))

    def run(
        self,
        function: Callable[..., Facts],
        arguments: Mapping[str, tuple[Any, ...]],
        *,
        at_once: Callable[[], int],
        on_done: Callable[[Facts], object],
    ) -> None:
        """Runs `function(*arguments[name])` as a task for each name, one CPU each, and commits what it returns.

        `at_once`, asked time and again, is how many are in Ray's hands. A task whose worker dies is run again. What a task
        raises is raised here, once the others have been cancelled.
        """
        commit = ray.remote(_commit).options(num_cpus=1)
        waiting = list(arguments.items())[::-1]
        running: dict[ray.ObjectRef, str] = {}
        try:
            while waiting or running:
                most = at_once()
                while waiting and len(running) < most:
                    name, values = waiting.pop()
                    running[commit.remote(function, storage.join(self.folder, f"{name}.json"), *values)] = name
                done, _ = ray.wait(list(running), num_returns=1)
                self.facts[running.pop(done[0])] = facts = ray.get(done[0])
                on_done(facts)
        except RayTaskError as error:
            raise (error.cause or error) from None
        finally:
            for task in running:
                ray.cancel(task)


def shuffle(
    inputs: Sequence[Any],
    split: Callable[..., list[pa.Table]],
    merge: Callable[[pa.Table], pa.Table],
    partitions: int,
    *shared: Any,
) -> list[ray.ObjectRef]:
    """`unclip.data.ingest.duplicates.Shuffle` by tasks, whose tables stay in the cluster's object store."""
    split_task = ray.remote(_split).options(num_cpus=1, num_returns=partitions)
    merge_task = ray.remote(_merge).options(num_cpus=1)
    rows = [split_task.remote(split, table, *shared) for table in inputs]
    columns = zip(*([row] if partitions == 1 else row for row in rows), strict=True)
    merged = [merge_task.remote(merge, *column) for column in columns]
    # One shuffle at a time: the tables of the next are as large.
    ray.wait(merged, num_returns=len(merged), fetch_local=False)
    return merged


def _commit(function: Callable[..., Facts], uri: str, *arguments: Any) -> Facts:
    facts = function(*arguments)
    storage.write_json(uri, facts)
    return facts


def _split(split: Callable[..., list[pa.Table]], table: pa.Table, *shared: Any) -> Any:
    tables = split(table, *shared)
    return tables[0] if len(tables) == 1 else tables


def _merge(merge: Callable[[pa.Table], pa.Table], *tables: pa.Table) -> pa.Table:
    return merge(pa.concat_tables(tables))
