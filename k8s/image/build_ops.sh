#!/usr/bin/env bash
# build_ops.sh VARIANT ENVIRONMENT: DeepSpeed again, with the operators that we use compiled: async_io, for offload to disks,
# and pin_memory, which that one loads. Without it the first run on each node would need a compiler and a minute.
# Run where requirements.txt is; needs g++, python3-dev and libaio-dev.
set -euo pipefail
variant=$1 environment=$(realpath "$2")
here=$(dirname "$(realpath "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export DS_ACCELERATOR=$variant DS_BUILD_AIO=1 DS_BUILD_PIN_MEMORY=1 CXX=$here/portable_cxx MAX_JOBS=2
if [ "$variant" = cuda ]; then
    # The compiler and headers of the CUDA that torch was built with, from the packages that its libraries come from.
    cuda=$(grep -o '^cuda-toolkit==[^ ]*' requirements.txt)
    uv pip install --quiet --target "$work" "${cuda/==/[nvcc]==}"
    CUDA_HOME=$(echo "$work"/nvidia/cu*)
    export CUDA_HOME
    mkdir "$CUDA_HOME/lib64"
    ln -s "$CUDA_HOME"/lib/libcudart.so.* "$CUDA_HOME/lib64/libcudart.so"
    # The driver's library is on the nodes. Nothing of it is called here, but the operator is linked against it.
    gcc -shared -Wl,-soname,libcuda.so.1 -o "$CUDA_HOME/lib64/libcuda.so" -x c /dev/null
fi

export PYC_INVALIDATION_MODE=UNCHECKED_HASH PATH=$environment/bin:$PATH
uv pip install --quiet --python "$environment" --compile-bytecode --no-cache --no-deps --no-build-isolation \
    --reinstall-package deepspeed --no-binary deepspeed "$(grep -o '^deepspeed==[^ ]*' requirements.txt)"
