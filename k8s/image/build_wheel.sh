#!/usr/bin/env bash
# build_wheel.sh FOLDER: the platform as a wheel. Run where pyproject.toml and platform/ are.
set -euo pipefail
uv build --quiet --wheel --build-constraint requirements.txt --out-dir "$1" .
