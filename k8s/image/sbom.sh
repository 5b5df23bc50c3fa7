#!/usr/bin/env bash
# sbom.sh ENVIRONMENT FILE: the packages of a virtual environment, with versions and licences, as CycloneDX JSON.
set -euo pipefail
cyclonedx-py environment --output-reproducible --output-format JSON --output-file "$2" "$1/bin/python"
