#!/usr/bin/env bash
# install_packages.sh VARIANT ENVIRONMENT EXTRAS: what requirements.txt pins, into a new virtual environment.
# Run where pyproject.toml and requirements.txt are. Which index has them is the business of uv's own configuration.
set -euo pipefail
variant=$1 environment=$2 extras=$3

case $variant in
    cpu) backend=(--torch-backend cpu) ;; # else torch brings 4 GB of CUDA's libraries
    cuda) backend=() ;;
    *) echo "VARIANT = '$variant': must be cpu or cuda" >&2; exit 2 ;;
esac

# Bytecode that is never compared with its source: an image's files change their dates, and nobody could write new bytecode.
export PYC_INVALIDATION_MODE=UNCHECKED_HASH
uv venv --quiet --no-python-downloads --python "${PYTHON:-/usr/bin/python3}" "$environment"
uv pip install --quiet --python "$environment" --compile-bytecode --link-mode copy "${backend[@]}" \
    --constraint requirements.txt --build-constraint requirements.txt --requirement pyproject.toml \
    $(printf -- '--extra %s ' ${extras//,/ })
