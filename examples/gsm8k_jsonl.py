"""
Write GSM8K to a file that `trl-credit grpo-lambda --config examples/configs/gsm8k.yaml` can train on.

    python examples/gsm8k_jsonl.py gsm8k.jsonl

The command line takes data in TRL's format: any dataset with a `prompt` column needs no such step.
"""

import sys

from gsm8k import load_gsm8k


if __name__ == "__main__":
    load_gsm8k(*sys.argv[2:]).to_json(sys.argv[1])
