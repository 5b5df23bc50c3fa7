"""How many workers nodes hold, and room for more that worker 0 sees."""

from __future__ import annotations

import gc
import time

import pytest
import ray

from unclip.cluster import room, session
from unclip.cluster.autoscaler import Bundle
from unclip.cluster.preflight import NOTHING, Demand, Node, PreflightError
from unclip.cluster.room import bundles, free_nodes, largest_that_fits, wait_for_room
from unclip.recipes import RECIPES


def wait_until_free(node: Node) -> None:
    """What has just ended takes a moment to give back what it had, and what begins to take it."""
    deadline = time.monotonic() + 60
    while (found := free_nodes()) != [node]:
        gc.collect()
        assert time.monotonic() < deadline, f"free: {found}, {ray.available_resources()}"
        time.sleep(0.1)


def demand(*, cpus: float = 1, gpus: float = 0, data_cpus: int = 1) -> Demand:
    return Demand(0, Node(cpus, gpus), data_cpus, 0, NOTHING)


def test_the_largest_number_that_nodes_hold() -> None:
    nodes = [Node(8, 4), Node(8, 2)]
    assert largest_that_fits((8, 4, 2), demand(gpus=1), nodes, placement="PACK") == 4
    assert largest_that_fits((8, 4, 2), demand(gpus=1), nodes, placement="STRICT_SPREAD") == 2
    assert largest_that_fits((8, 4), demand(gpus=4), nodes, placement="PACK") is None
    assert largest_that_fits((16, 8), demand(data_cpus=8), nodes, placement="PACK") == 8


def test_what_is_asked_of_an_autoscaler() -> None:
    labels = {"unclip/group": "train"}
    claims = Demand(2, Node(3, 1), data_cpus=2, clip_actors=1, clip_actor=Node(0, 0.5), labels=labels)
    worker, data = Bundle({"CPU": 3, "GPU": 1}, labels), Bundle({"CPU": 1})
    clip = Bundle({"GPU": 0.5}, labels)
    assert bundles(claims, "PACK") == ([worker, worker, data, data, clip], "PACK")
    assert bundles(claims, "STRICT_SPREAD") == ([worker, worker], "STRICT_SPREAD")
    assert bundles(claims, "STRICT_PACK") == ([Bundle({"CPU": 6, "GPU": 2}, labels), data, data, clip], "PACK")


@pytest.mark.parametrize("placement", ["PACK", "STRICT_PACK"])
def test_workers_without_gpus_are_asked_for_by_their_labels_and_data_anywhere(placement: str) -> None:
    labels = {"unclip/group": "train"}
    claims = Demand(2, Node(1, 0), data_cpus=1, clip_actors=1, clip_actor=Node(1, 0), labels=labels)
    asked, _ = bundles(claims, placement)
    assert sum(bundle.resources["CPU"] for bundle in asked if bundle.labels == labels) == 2
    assert sum(bundle.resources["CPU"] for bundle in asked if not bundle.labels) == 2


def test_numbers_of_workers_share_the_batch_in_whole_micro_batches() -> None:
    def counts(most: int, fewest: int | None, batch: int, micro: int) -> tuple[int, ...]:
        config = RECIPES["decoder"]["debug"]().merged({"loop": {"global_batch_size": batch, "microbatch_size": micro}})
        return config.merged({"resources": {"num_workers": most, "min_workers": fewest}}).worker_counts

    assert counts(4, None, 24, 2) == (4,)
    assert counts(4, 1, 24, 2) == (4, 3, 2, 1)
    assert counts(8, 2, 32, 4) == (8, 4, 2)
    assert counts(6, 1, 12, 4) == (6, 4, 3, 1)  # halves are 6 samples: no whole micro-batches of 4


def test_a_run_with_fewer_workers_is_the_same_run() -> None:
    config = RECIPES["decoder"]["debug"]().merged({"resources": {"num_workers": 4, "min_workers": 1}})
    smaller = config.for_workers(2)
    assert (smaller.resources.num_workers, smaller.rank_batch_size) == (2, 2 * config.rank_batch_size)
    assert smaller.merged({"resources": {"num_workers": 4}}) == config


def test_what_others_use_is_no_room() -> None:
    cpus = session.local_cpus()

    @ray.remote(num_cpus=cpus - 2)
    class Neighbour:
        def here(self) -> bool:
            return True

    wait_until_free(Node(cpus, 0))
    neighbour = Neighbour.remote()
    ray.get(neighbour.here.remote())
    wait_until_free(Node(2, 0))
    (node,) = ray.nodes()
    assert free_nodes({node["NodeID"]: 2}, Node(1.5, 0)) == [Node(5, 0)]
    looks: list[float] = []
    with pytest.raises(PreflightError, match=r"(?s)needed: 2 workers x 1 CPUs.*there:  2 CPUs.*Waited \d+ s"):
        wait_for_room((4, 2), demand(), placement="PACK", wait_s=0.6, watch=lambda: looks.append(time.monotonic()))
    assert looks
    ray.kill(neighbour)
    # What has just ended takes a moment to give back what it had; the larger number is waited for.
    assert wait_for_room((3, 1), demand(), placement="PACK", wait_s=30, watch=lambda: None) == 3


def test_less_is_taken_when_more_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SETTLE_S", 0.1)
    cpus = session.local_cpus()
    wait_until_free(Node(cpus, 0))

    @ray.remote(num_cpus=2)
    class Neighbour:
        def here(self) -> bool:
            return True

    neighbour = Neighbour.remote()
    ray.get(neighbour.here.remote())
    wait_until_free(Node(cpus - 2, 0))
    counts = tuple(range(cpus - 1, 0, -1))
    assert wait_for_room(counts, demand(), placement="PACK", wait_s=30, watch=lambda: None) == cpus - 3
    ray.kill(neighbour)
