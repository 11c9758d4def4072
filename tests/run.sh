#!/usr/bin/env bash
# Run the whole test suite, in environments that it makes:   bash tests/run.sh [PYTEST ARGUMENTS]
# vLLM has one of its own (`.venv-vllm`, 4 GB); set SKIP_VLLM=1 to leave its tests out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

bash examples/install.sh .venv test,docs
.venv/bin/python -m pytest tests --ignore tests/with_vllm --numprocesses 2 --dist loadfile --durations 15 "$@"
if [ -z "${SKIP_VLLM:-}" ]; then
    bash tests/with_vllm/make_env.sh .venv-vllm
    .venv-vllm/bin/python -m pytest tests/with_vllm "$@"
fi
