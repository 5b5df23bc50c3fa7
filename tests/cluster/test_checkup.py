"""Each check finds what is really broken, names it and says what to do; a cluster that is fit is in tests/e2e/test_rayjobs.py."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from jobs.preflight import main
from tests.support.faults import ACCESS_DENIED
from tests.support.s3 import ObjectStore

from unclip.cluster import preflight, session
from unclip.cluster.checkup import all_reduce, clock, gpus, machine, ports, room, storage, versions
from unclip.cluster.checkup.all_reduce import Ranks, Ring
from unclip.cluster.checkup.clock import Exchange
from unclip.cluster.checkup.config import CheckupConfig
from unclip.cluster.checkup.gpus import Claimed, GpuState
from unclip.cluster.checkup.machine import GIB, Disk
from unclip.cluster.checkup.nodes import Probes, Silence, living_places, within
from unclip.cluster.checkup.ports import Target
from unclip.cluster.checkup.result import Result, lines
from unclip.cluster.checkup.run import run_checkup, settle
from unclip.config.base import ConfigError
from unclip.recipes import RECIPES
from unclip.utils import storage as files

ROOT = Path(__file__).parents[2]
QUICK = {"transfer_mb": 1, "limit_s": 60.0}


@pytest.fixture(scope="module")
def probes() -> Iterator[Probes]:
    with Probes(living_places(), limit_s=60) as made:
        yield made


def checkup(uri: str, *checks: str, **settings: Any) -> list[Result]:
    """Those checks, on the one node there is."""
    config = CheckupConfig.from_dict({"storage": uri, "checks": checks} | QUICK | settings)
    return [result for results in run_checkup(settle(config, RECIPES, ROOT), RECIPES) for result in results]


# --- the whole


def test_what_failed_decides_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["storage=" + str(tmp_path), "checks=[room, open_files]", "cpus=1000"]
    assert main([part for setting in arguments for part in ("--set", setting)]) == 1
    shown = capsys.readouterr()
    assert "failed   room" in shown.out
    assert "→ ask for fewer or smaller CPUs, or add nodes" in shown.out
    assert "1 of 2 checks failed: room" in shown.err


def test_a_dry_run_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--set", f"storage={tmp_path}/store", "--dry-run"]) == 0
    assert "would check nodes, versions" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "storage: required"),
        ({"storage": "x", "stage": "decoder", "recipe": "nosuch"}, "recipe = 'nosuch': decoder has"),
        ({"storage": "x", "stage": "prior", "settings": ["loop.max_stops=1"]}, "settings: .*max_stops"),
        ({"storage": "x", "stage": "prior", "gpus": 8}, "leave gpus and cpus out"),
        ({"storage": "x", "requirements": "nosuch.txt"}, "requirements = 'nosuch.txt'"),
        ({"storage": "x", "checks": []}, r"checks = \[\]: name one"),
        ({"storage": "x", "report": "/proc/report.json"}, r"report = '/proc/report.json': .*cannot be written"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(CheckupConfig.from_dict(settings), RECIPES, ROOT)


# --- nodes that do not answer


def test_a_node_that_hangs_has_failed_and_holds_up_nobody() -> None:
    with Probes(living_places(), limit_s=2) as probes:
        ((place, pid),) = probes.ask(os.getpid)
        assert not isinstance(pid, Silence)
        os.kill(pid, signal.SIGSTOP)
        try:
            assert probes.ask(time.time) == [(place, Silence("no answer in 2 s"))]
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_node_whose_process_dies_and_one_that_raises(probes: Probes) -> None:
    ((_, raised),) = probes.ask(machine.measure_disk, "/nosuch", 1)
    assert isinstance(raised, Silence)
    assert raised.reason.startswith("FileNotFoundError: ")
    with Probes(living_places(), limit_s=60) as others:
        ((_, died),) = others.ask(os._exit, 1)
    assert isinstance(died, Silence)
    assert died.reason.startswith("the process there ended: ")


def test_what_the_driver_does_itself_has_a_limit_too() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match="not done in 0 s"):
        within(0.1, never.wait)
    never.set()


# --- what each check finds


def test_versions_differ_between_nodes(probes: Probes) -> None:
    ((_, here),) = probes.ask(versions.versions_here)
    assert not isinstance(here, Silence)
    other = here | {"torch": "1.0", "driver": "580.1"}
    found = versions.compare({"a": here, "b": here, "c": other})
    assert [found[node].status for node in "abc"] == ["ok", "ok", "failed"]
    assert found["c"].found == f"torch 1.0, not {here['torch']}"


def test_packages_that_are_not_those_of_the_pins(probes: Probes) -> None:
    conditional = "numpy==0.1 ; python_version >= '3'\ntorch==0.1 ; sys_platform == 'win32'\n"
    pins = versions.read_pins(f"# pinned\nray=={ray.__version__}\nnosuch==1\n{conditional}")
    ((_, unlike),) = probes.ask(versions.unlike_pins, pins)
    assert not isinstance(unlike, Silence)
    assert [words.split()[0] for words in unlike] == ["numpy"]
    finding = versions.judge_pins(unlike, len(pins), "requirements.txt")
    assert finding.status == "warning"
    assert "pinned==0.1" in finding.found


def test_the_pins_of_the_repository_are_read() -> None:
    pins = versions.read_pins((ROOT / "requirements.txt").read_text())
    assert f"ray=={ray.__version__}" in pins
    assert len(pins) > 100


def test_a_clock_that_is_ahead_is_told_from_a_slow_answer(probes: Probes) -> None:
    (place,) = probes.places
    exchanges = clock.exchange(probes, place)
    assert not isinstance(exchanges, Silence)
    assert clock.judge_clock(exchanges).status == "ok"
    ahead = [replace(one, remote=one.remote + 3) for one in exchanges]
    finding = clock.judge_clock(ahead)
    assert finding.status == "failed"
    assert finding.found.startswith(("+3000", "+2999", "+3001", "+300", "+299"))
    slow = Exchange(sent=100, remote=103, received=104)  # anything from 1 s behind to 3 s ahead
    assert clock.judge_clock([slow]).status == "ok"
    quick = Exchange(sent=110, remote=107.5, received=110.1)
    assert clock.judge_clock([slow, quick]).found == "-2550.0 ms from the driver's clock, to within 50.0 ms"


def test_a_closed_port_is_named(probes: Probes) -> None:
    targets = ports.targets_of(probes)
    assert {"GCS", "raylet", "object manager", "worker"} <= {target.service for target in targets}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # and does not listen
        closed = Target("raylet", "b", "127.0.0.1", listener.getsockname()[1])
        ((_, found),) = probes.ask(ports.unreached, [*targets, closed])
    assert found == [(closed, "Connection refused")]
    finding = ports.judge_ports(found, [*targets, closed])
    assert finding.status == "failed"
    assert f"1 of {len(targets) + 1} ports not reached: raylet of b (127.0.0.1:{closed.port})" in finding.found
    assert ports.judge_ports([(replace(closed, service="metrics"), "no answer")], targets).status == "warning"


def test_shared_memory_below_the_object_store(probes: Probes) -> None:
    ((place, total),) = probes.ask(machine.shared_memory)
    assert total == os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    assert machine.judge_shared_memory(total, place.object_store_bytes).status == "ok"
    finding = machine.judge_shared_memory(64 * 2**20, place.object_store_bytes)
    assert finding.status == "failed"
    assert finding.found == f"/dev/shm 0.1 GiB, object store {place.object_store_bytes / GIB:.1f} GiB"


def test_the_folder_that_the_raylet_spills_to_is_measured(probes: Probes) -> None:
    ((_, disk),) = probes.ask(machine.spill_disk, 1)
    assert not isinstance(disk, Silence)
    assert Path(disk.folder).is_relative_to("/tmp/ray/session") or "session_" in disk.folder
    assert disk.write_mb_s > 0
    assert not [name for name in os.listdir(disk.folder) if name.startswith(".unclip-")]


def test_disks_that_are_full_or_slow() -> None:
    disk = Disk("/spill", total=100 * GIB, free=90 * GIB, write_mb_s=500)
    assert machine.judge_spill(disk, 10 * GIB).status == "ok"
    assert machine.judge_spill(replace(disk, free=4 * GIB), 10 * GIB).status == "failed"
    assert machine.judge_spill(replace(disk, free=12 * GIB), 10 * GIB).status == "warning"
    assert machine.judge_spill(replace(disk, write_mb_s=20), 10 * GIB).status == "warning"
    assert machine.judge_scratch(replace(disk, free=GIB // 2)).status == "failed"
    assert machine.judge_scratch(replace(disk, free=2 * GIB)).status == "warning"


def test_few_open_files(probes: Probes) -> None:
    ((_, limits),) = probes.ask(machine.open_files)
    assert not isinstance(limits, Silence)
    assert limits[1] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert [machine.judge_open_files(soft, 4096).status for soft in (256, 4096, 65_536)] == ["failed", "warning", "ok"]


def test_a_gpu_that_ray_declares_and_nobody_has() -> None:
    states = gpus.gpus_here()
    finding = gpus.judge_inventory(states, len(states) + 1)
    assert finding.status == "failed"
    assert finding.found == f"Ray declares {len(states) + 1} GPUs, the driver has {len(states)}"


H100 = GpuState("NVIDIA H100 80GB HBM3", 80 * GIB, 0, 40, 0, False, "", 18)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "ok", "2 x NVIDIA H100 80GB HBM3, 80 GiB, 18 NVLinks each, at most 40 °C"),
        ({"ecc": 2}, "failed", "GPU 1: 2 ECC errors"),
        ({"remapping": True}, "failed", "GPU 1: memory rows"),
        ({"slowed": "heat"}, "warning", "GPU 1: slowed by heat"),
        ({"memory_used": 30 * GIB}, "warning", "GPU 1: 30.0 GiB in use"),
        ({"name": "NVIDIA A100"}, "warning", "several kinds"),
    ],
)
def test_gpus_that_are_not_well(changes: dict[str, Any], status: str, words: str) -> None:
    finding = gpus.judge_inventory([H100, replace(H100, **changes)], 2)
    assert finding.status == status
    assert words in finding.found


def test_what_pytorch_sees_of_claimed_gpus() -> None:
    sound = Claimed(["A", "A"], [], is_right=True)
    assert gpus.judge_claimed(sound, 2).status == "ok"
    assert gpus.judge_claimed(sound, 8).status == "failed"
    assert gpus.judge_claimed(replace(sound, is_right=False), 2).status == "failed"
    assert "GPUs 0-1 do not reach" in gpus.judge_claimed(replace(sound, apart=[(0, 1)]), 2).found


def test_too_few_cpus_are_left_for_data(tmp_path: Path) -> None:
    cpus = session.local_cpus()
    run = {"stage": "decoder", "recipe": "debug"}
    (fits,) = checkup(str(tmp_path), "room", **run)
    assert fits.status == "ok"
    assert f"beside the rest {cpus - 1} CPUs are left for data, which asks for 1" in fits.found
    (refused,) = checkup(str(tmp_path), "room", **run, settings=[f"resources.data_cpus={cpus}"])
    assert refused.status == "failed"
    assert refused.found.startswith("1 CPUs are missing: ")
    assert "--set resources.num_workers=1" in refused.advice


def test_a_trial_that_has_no_room_says_what_is_missing(tmp_path: Path) -> None:
    (refused,) = checkup(str(tmp_path), "training", node_labels={"unclip/group": "nosuch"}, training_limit_s=16)
    assert refused.status == "failed"
    assert "only 0 of 2 workers find a place on a node" in refused.found


def test_what_an_autoscaler_said_is_the_advice() -> None:
    demand = preflight.Demand(8, preflight.Node(0, 1), data_cpus=0)
    finding = room.judge_room(demand, [preflight.Node(4, 0)], placement="PACK", refusal="It has no nodes for it")
    assert (finding.status, finding.advice) == ("failed", "It has no nodes for it")


def test_a_storage_that_lets_nobody_in(disturbed_store: ObjectStore) -> None:
    with disturbed_store.proxy.faults(kinds=(ACCESS_DENIED,), most=1000):
        refused, untrained = checkup(f"{disturbed_store.uri}/checkup", "storage", "training")
    assert untrained.status == "failed"
    assert "the trial training ended: PermissionError: " in untrained.found
    assert refused.status == "failed"
    assert refused.found.startswith("cannot write: ")
    assert "AccessDenied" in refused.found
    assert "s3:PutObject" in refused.advice


@pytest.mark.parametrize(
    ("methods", "step"), [(("DELETE", "POST"), "cannot delete: "), (("GET",), "cannot see what another node wrote: ")]
)
def test_a_right_that_is_missing_is_found_by_the_step_that_needs_it(
    methods: tuple[str, ...], step: str, disturbed_store: ObjectStore
) -> None:
    with disturbed_store.proxy.faults(kinds=(ACCESS_DENIED,), most=1000, methods=methods):
        (refused,) = checkup(f"{disturbed_store.uri}/checkup", "storage")
    assert refused.status == "failed"
    assert refused.found.startswith(step)


def test_a_bucket_that_is_not_there(object_store: str) -> None:
    (refused,) = checkup("s3://nosuchbucket/here", "storage")
    assert refused.status == "failed"
    assert refused.advice.startswith("make the bucket")


@pytest.mark.parametrize("address", ["gs://bucket/here", "nosuch://bucket/here"])
def test_an_address_of_another_kind(address: str) -> None:
    trouble = storage.write_token(address, "token")
    assert isinstance(trouble, storage.Trouble)
    assert storage.judge_storage(trouble, address).advice == "use a folder or an s3:// address"


def test_a_sound_bucket_is_left_as_it_was(object_store: str) -> None:
    (fine,) = checkup(f"{object_store}/sound", "storage")
    assert fine.status in ("ok", "warning"), fine
    assert "MB/s" in fine.found
    assert files.names(f"{object_store}/sound") == []


def test_a_folder_that_another_node_does_not_see(tmp_path: Path) -> None:
    trouble = storage.use(str(tmp_path / "not-shared"), "token", "node", 1)
    assert isinstance(trouble, storage.Trouble)
    finding = storage.judge_storage(trouble, str(tmp_path))
    assert finding.found.startswith("cannot see what another node wrote")
    assert finding.advice.startswith("mount one file system")


def test_a_store_that_shows_what_was_there_before(tmp_path: Path) -> None:
    (tmp_path / storage.TOKEN).write_text("of another checkup")
    trouble = storage.use(str(tmp_path), "token", "node", 1)
    assert isinstance(trouble, storage.Trouble)
    assert "no cache between" in storage.advice_for(trouble, "s3://bucket/x")


def test_ranks_that_do_not_find_each_other(probes: Probes) -> None:
    """One of the two is stopped: the other waits, and the wait has an end."""
    ranks = Ranks(probes.places)
    try:
        assert len(ranks.members) == 2
        (sound,) = ranks.within_nodes(60).values()
        assert isinstance(sound, Ring)
        assert sound.is_right
        assert all_reduce.judge_ring(sound, per_node=2, nodes=1).status == "ok"
        ray.kill(ranks.members[1][1])
        (broken,) = ranks.within_nodes(5).values()
    finally:
        ranks.end()
    assert isinstance(broken, Silence)
    finding = all_reduce.judge_ring(broken, per_node=2, nodes=1)
    assert finding.status == "failed"
    assert "NCCL_SOCKET_IFNAME" in finding.advice


@pytest.mark.parametrize(("share", "status"), [(0.8, "ok"), (0.2, "warning"), (0.02, "failed")])
def test_links_against_the_data_sheet(share: float, status: str) -> None:
    name = "NVIDIA H100 80GB HBM3"  # 450 GB/s within a node, 50 to others
    within_node = all_reduce.judge_ring(Ring(8, share * 450e9, True, name), per_node=8, nodes=1)
    across = all_reduce.judge_ring(Ring(16, share * 400e9, True, name), per_node=8, nodes=2)
    assert (within_node.status, across.status) == (status, status)
    assert f"{share:.0%} of the 450" in within_node.found
    assert f"{share:.0%} of the 400" in across.found
    assert all_reduce.judge_ring(Ring(8, 450e9, False, name), per_node=8, nodes=1).status == "failed"


def test_many_nodes_share_a_row() -> None:
    results = [Result("ok", f"{number} MB/s", "", "storage", f"node-{number}") for number in range(64)]
    results.append(Result("failed", "no answer in 5 s", "replace it", "storage", "node-64"))
    rows = lines(results)
    assert rows[0].split()[:3] == ["failed", "storage", "node-64:"]
    assert rows[1].strip() == "→ replace it"
    assert rows[2].endswith("64 nodes, as node-0: 0 MB/s")
    assert len(rows) == 3
