"""Programs and libraries: the same on every node, and those that the project was tested with."""

from __future__ import annotations

import hashlib
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import ray
import torch
from packaging.requirements import Requirement

import unclip
from unclip.cluster.checkup.result import Finding, failed, ok, warning

_DRIVER = Path("/proc/driver/nvidia/version")
_SHOWN = 4


def versions_here() -> dict[str, str]:
    """What this process runs with."""
    found = {
        "python": platform.python_version(),
        "unclip": sources_hash(),
        "ray": ray.__version__,
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed"),
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | driver_version()


def sources_hash() -> str:
    """A hash of the package's files: what workers run may be installed, or come with the job."""
    folder, digest = Path(unclip.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def driver_version() -> dict[str, str]:
    """Of the NVIDIA driver, where this machine has one."""
    found = re.search(r"(\d+\.\d+[.\d]*)", _DRIVER.read_text()) if _DRIVER.exists() else None
    return {"driver": found[1]} if found else {}


def compare(nodes: Mapping[str, Mapping[str, str]]) -> dict[str, Finding]:
    """For each node, what differs from most nodes that have it at all: nodes without a GPU have no driver."""
    usual = {
        name: Counter(found[name] for found in nodes.values() if name in found).most_common(1)[0][0]
        for name in {name for found in nodes.values() for name in found}
    }
    findings = {}
    for node, found in nodes.items():
        others = [f"{name} {version}, not {usual[name]}" for name, version in found.items() if version != usual[name]]
        if others:
            advice = "give all nodes one image: workers exchange pickled Python, and NCCL wants one version of itself"
            findings[node] = failed("; ".join(others), advice)
        else:
            findings[node] = ok(", ".join(f"{name} {version}" for name, version in found.items()))
    return findings


def unlike_pins(pins: Iterable[str]) -> list[str]:
    """Installed packages that are not those of `pins` (lines `name==version ; marker`), in words; missing ones are not named."""
    unlike = []
    for line in pins:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            unlike.append(f"{requirement.name} {installed}, pinned{requirement.specifier}")
    return unlike


def judge_pins(unlike: list[str], count: int, file: str) -> Finding:
    if not unlike:
        return ok(f"what is installed of the {count} packages in {file} has the version there")
    more = f" and {len(unlike) - _SHOWN} more" if len(unlike) > _SHOWN else ""
    return warning(
        "; ".join(unlike[:_SHOWN]) + more,
        f"build the image from {file}: other versions may work, and nobody has tried them together",
    )


def read_pins(text: str) -> list[str]:
    """The lines of a requirements file that pin a package."""
    stripped = (line.split(" #")[0].strip().rstrip("\\").strip() for line in text.splitlines())
    return [line for line in stripped if "==" in line and not line.startswith(("#", "-"))]
