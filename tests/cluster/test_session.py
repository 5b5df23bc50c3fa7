"""The local instance that jobs get where there is no cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ray

from unclip.cluster import session


def test_declares_more_cpus_than_cores_and_little_shared_memory() -> None:
    there = ray.cluster_resources()
    assert there["CPU"] == session.local_cpus() >= max(4, 2 * len(os.sched_getaffinity(0)))
    assert there["object_store_memory"] <= session.MAX_OBJECT_STORE_BYTES


def test_an_existing_connection_is_used_and_kept() -> None:
    address = ray.get_runtime_context().gcs_address
    with session.session():
        assert ray.get_runtime_context().gcs_address == address
    session.connect()
    assert ray.is_initialized()
    assert ray.get_runtime_context().gcs_address == address


def test_workers_import_our_package_and_pythons_own_platform() -> None:
    @ray.remote
    def look() -> tuple[str, str, str, str]:
        import platform

        import unclip

        return unclip.__file__, platform.__file__, platform.system(), os.environ["PATH"].split(os.pathsep)[0]

    package, standard_library, system, first_on_path = ray.get(look.remote(), timeout=120)
    import unclip

    assert package == unclip.__file__
    assert Path(standard_library).name == "platform.py"
    assert system == "Linux"
    assert first_on_path == str(Path(sys.executable).parent)


def test_no_job_hides_a_module_of_pythons_own() -> None:
    """Ray puts the folder of the driver's script on the path of every worker, before the standard library."""
    jobs = {path.stem for path in (Path(__file__).parents[2] / "jobs").glob("*.py")}
    assert not jobs & sys.stdlib_module_names
