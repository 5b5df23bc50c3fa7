#!/usr/bin/env bash
# smoke.sh FOLDER: starts everything that a pod is ever asked to start, with the `python` on PATH, where FOLDER has jobs/.
set -euo pipefail
cd "$1"
commands=(
    "ray start --help" "ray job submit --help" "ray health-check --help" "ray kuberay-autoscaler --help" "serve --help"
    "python -c 'import ray.autoscaler._private.kuberay.run_autoscaler'"
    "python -c 'import unclip.cluster.serve as serve; serve.build'"
)
for job in jobs/*.py; do commands+=("python $job --help"); done

start() {
    local output
    output=$(bash -c "$1" 2>&1) || { printf '%s: status %s\n%s\n' "$1" "$?" "$output" >&2; return 1; }
    echo "starts: $1"
}
export -f start
printf '%s\0' "${commands[@]}" | xargs --null --max-procs="$(nproc)" --replace bash -c 'start "$1"' _ '{}'
