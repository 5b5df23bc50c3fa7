"""What does not fit a cluster is refused with words that help, and what fits is let through."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from unclip.cluster import preflight, session
from unclip.cluster.preflight import Demand, Node, PreflightError, what_is_missing
from unclip.config.resources import ResourcesConfig


def demand(workers: int, cpus: float = 1, gpus: float = 0, *, data_cpus: int = 1, clip_actors: int = 0) -> Demand:
    return Demand(workers, Node(cpus, gpus), data_cpus, clip_actors, Node(1, 0))


def test_workers_and_the_data_stream_have_to_fit_together() -> None:
    assert what_is_missing(demand(3), [Node(4, 0)]) is None
    assert what_is_missing(demand(4), [Node(4, 0)]) == "1 CPUs are missing"
    assert what_is_missing(demand(2, clip_actors=2), [Node(4, 0)]) == "1 CPUs are missing"
    assert what_is_missing(demand(4), [Node(4, 0), Node(1, 0)]) is None


def test_a_worker_has_to_fit_one_node() -> None:
    assert what_is_missing(demand(1, cpus=6), [Node(4, 0), Node(4, 0)]) == "only 0 of 1 workers find a place on a node"
    assert (
        what_is_missing(demand(3, gpus=4), [Node(64, 8), Node(64, 2)]) == "only 2 of 3 workers find a place on a node"
    )


def test_only_nodes_with_the_labels_hold_workers_and_gpus_and_any_node_the_stream() -> None:
    nodes = [Node(8, 4, {"unclip/group": "train"}), Node(8, 4, {"unclip/group": "serve"}), Node(8, 0)]
    labelled = replace(demand(4, gpus=1, data_cpus=20), labels={"unclip/group": "train"})
    assert what_is_missing(labelled, nodes) is None
    five = replace(labelled, workers=5)
    assert what_is_missing(five, nodes) == "only 4 of 5 workers find a place on a node"
    assert what_is_missing(replace(five, data_cpus=1, labels={}), nodes) is None
    clip = replace(labelled, workers=3, clip_actors=2, clip_actor=Node(0, 1))
    assert what_is_missing(clip, nodes) == "1 GPUs are missing"
    text = preflight.explain("x", five, nodes)
    assert "workers use those with unclip/group=train only: 8 CPUs, 4 GPUs on 1 nodes" in text


def test_strict_placements() -> None:
    nodes = [Node(8, 4), Node(8, 4)]
    assert what_is_missing(demand(8, gpus=1), nodes, placement="PACK") is None
    assert "STRICT_PACK" in (what_is_missing(demand(8, gpus=1), nodes, placement="STRICT_PACK") or "")
    assert "only 2 of 3" in (what_is_missing(demand(3, gpus=1), nodes, placement="STRICT_SPREAD") or "")


def test_too_many_workers_are_refused_with_settings_that_fit() -> None:
    cpus = session.local_cpus()
    with pytest.raises(PreflightError) as refused:
        preflight.check_resources(ResourcesConfig(num_workers=100, data_cpus=2, use_gpu="no"))
    message = str(refused.value)
    assert f"only {cpus} of 100 workers" in message
    assert "100 workers x 1 CPUs + 2 CPUs for the data stream = 102 CPUs" in message
    assert f"{cpus} CPUs on 1 nodes" in message
    settings = dict(re.findall(r"--set resources\.(\w+)=(\d+)", message))
    preflight.check_resources(ResourcesConfig(use_gpu="no", **{name: int(value) for name, value in settings.items()}))
    assert int(settings["num_workers"]) == cpus - 1


def test_gpus_that_are_not_there_are_refused() -> None:
    assert not preflight.uses_gpu(ResourcesConfig(use_gpu="auto"), preflight.cluster_nodes())
    with pytest.raises(PreflightError, match=r"the cluster has no GPU: .* resources\.use_gpu=no"):
        preflight.check_resources(ResourcesConfig(use_gpu="yes"))


def test_clip_actors_count() -> None:
    resources = ResourcesConfig(use_gpu="no", clip_actors=session.local_cpus())
    preflight.check_resources(resources, clip_in_stream=False)
    with pytest.raises(PreflightError, match="CLIP actors"):
        preflight.check_resources(resources, clip_in_stream=True)


@pytest.mark.parametrize(
    ("asked", "maker", "nodes", "count"),
    [
        (None, Node(1, 0), [Node(8, 0), Node(8, 0)], 1),  # on CPUs one has all the cores of a node
        (None, Node(1, 1), [Node(8, 4), Node(8, 0), Node(2, 4)], 6),  # no CPU is left for two of the GPUs
        (None, Node(0.5, 0.25), [Node(8, 1)], 4),
        (3, Node(1, 0.5), [Node(8, 1), Node(8, 1)], 3),
    ],
)
def test_makers_are_as_many_as_gpus_hold(asked: int | None, maker: Node, nodes: list[Node], count: int) -> None:
    assert preflight.fit_makers(asked, maker, nodes, {}) == count


def test_makers_that_do_not_fit_are_refused_with_a_number_that_does() -> None:
    with pytest.raises(PreflightError, match=r"3 of 4 actors find a place.*\n.*= 8 CPUs, 4 GPUs") as refused:
        preflight.fit_makers(4, Node(2, 1), [Node(64, 2), Node(4, 1)], {})
    assert "68 CPUs, 3 GPUs on 2 nodes, the largest with 64 CPUs, 2 GPUs" in str(refused.value)
    assert "--set actors=3" in str(refused.value)
    with pytest.raises(PreflightError, match="0 of 1 actors find a place"):
        preflight.fit_makers(None, Node(1, 1), [Node(4, 0)], {})


def test_labels_that_no_node_has_are_what_is_to_be_corrected() -> None:
    labels, nodes = {"unclip/group": "tarin"}, [Node(8, 4, {"unclip/group": "train"})]
    with pytest.raises(PreflightError) as refused:
        preflight.fit_makers(2, Node(1, 1), nodes, labels)
    run = preflight.explain("x", replace(demand(2, gpus=1), labels=labels), nodes)
    for text, who in ((str(refused.value), "actors"), (run, "workers")):
        assert f"{who} use those with unclip/group=tarin only: 0 CPUs on 0 nodes" in text
        assert text.endswith(
            "no node has the labels that node_labels asks for: correct it, or start nodes with --labels=unclip/group=tarin"
        )
