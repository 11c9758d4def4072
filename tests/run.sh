#!/usr/bin/env bash
# Run the whole test suite, in environments that it makes:   bash tests/run.sh [PYTEST ARGUMENTS]
# vLLM has one of its own (`.venv-vllm`, 4 GB); set SKIP_VLLM=1 to leave its tests out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Both suites run, whatever comes of the first, and their closing lines stand together at the end.
closing=() failed=0 interrupted="" log=$(mktemp)
trap 'failed=1 interrupted=1' INT
suite() { # PYTHON ARGUMENTS...
    "$1" -m pytest -m "" "${@:2}" 2>&1 | tee -i "$log" || failed=1
    closing+=("$1: $(tail -n 1 "$log")")
}

bash examples/install.sh .venv test,docs
suite .venv/bin/python tests --ignore tests/with_vllm --numprocesses 2 --dist loadfile --durations 15 "$@"
if [ -z "${SKIP_VLLM:-}$interrupted" ]; then
    bash tests/with_vllm/make_env.sh .venv-vllm
    suite .venv-vllm/bin/python tests/with_vllm "$@"
fi
printf '%s\n' "" "${closing[@]}"
exit $failed
