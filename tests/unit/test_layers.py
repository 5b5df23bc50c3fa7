"""What may not be imported where, in fresh processes."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import unclip

REPOSITORY = Path(__file__).parents[2]
BELOW_CLUSTER = [
    name for _, name, _ in pkgutil.walk_packages(unclip.__path__, "unclip.") if not name.startswith("unclip.cluster")
]


def run_python(code: str, cwd: Path = REPOSITORY) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_below_cluster_imports_ray() -> None:
    imports = "\n".join(f"import {name}" for name in BELOW_CLUSTER)
    assert len(BELOW_CLUSTER) > 20
    assert run_python(f"import sys; sys.path.insert(0, 'platform')\n{imports}\nprint('ray' in sys.modules)") == "False"


def test_configuration_is_light() -> None:
    """`--help` and configuration errors should not wait for torch."""
    code = "import sys, unclip.config.base, unclip.config.cli; print('torch' in sys.modules)"
    assert run_python(code, cwd=REPOSITORY / "platform") == "False"


def test_the_platform_folder_leaves_pythons_own_platform_module_alone() -> None:
    assert not (REPOSITORY / "platform" / "__init__.py").exists()
    code = "import sys; sys.path.insert(0, '.'); import platform; print(platform.__file__, platform.system())"
    file, system = run_python(code).split()
    assert not Path(file).is_relative_to(REPOSITORY / "platform")
    assert system == run_python("import platform; print(platform.system())", cwd=Path("/"))


@pytest.mark.parametrize("folder", ["platform", "jobs", "tests"])
def test_no_file_shadows_a_module_of_the_standard_library(folder: str) -> None:
    names = {path.stem for path in (REPOSITORY / folder).glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
