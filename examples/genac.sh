#!/usr/bin/env bash
# GenAC's three stages on GSM8K: an oracle shows the critic how to reason, REINFORCE teaches it the values of the policy
# as it is, then both learn together.
#
#     python examples/gsm8k_jsonl.py gsm8k.jsonl
#     export OPENAI_API_KEY=...
#     bash examples/genac.sh --oracle https://api.openai.com/v1 --oracle_model gpt-5
#
# Arguments are those of the first stage: any server that speaks OpenAI's protocol does, and so does a function of yours,
# `--oracle my_module:my_oracle`. Settings are in examples/configs/genac, one file for each stage. Started again after an
# interruption, the script goes on where it was.
set -euo pipefail
CONFIGS=${CONFIGS:-$(dirname "${BASH_SOURCE[0]}")/configs/genac}

resume() {  # the option that goes on from the last checkpoint in a folder, if there is one
    if compgen -G "$1/checkpoint-*" > /dev/null; then echo --resume_from_checkpoint "$(ls -td "$1"/checkpoint-* | head -1)"; fi
}

[ -e genac-traces/summary.json ] || trl-credit genac-traces --config "$CONFIGS/traces.yaml" "$@"
[ -e genac-sft/config.json ] || trl-credit genac-sft --config "$CONFIGS/sft.yaml" $(resume genac-sft)
[ -e genac-pretrain/critic/config.json ] || trl-credit genac-pretrain --config "$CONFIGS/pretrain.yaml" $(resume genac-pretrain)
trl-credit genac --config "$CONFIGS/joint.yaml" $(resume genac)
