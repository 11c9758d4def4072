"""What `trl-credit genac-traces` runs in each process: the script of `trl grpo`, which samples and trains nothing."""

import json
from pathlib import Path

from trl_credit.journal import read_rows
from trl_credit.scripts import grpo_parser
from trl_credit.seam.scripts import run_grpo_script
from trl_credit.trainers.genac.traces import GenACTracesConfig, TraceCollector, write_dataset


def make_parser(prog: str | None = None):
    """The parser of `trl grpo` with the fields of [`GenACTracesConfig`]."""
    return grpo_parser(GenACTracesConfig, prog)


def filter_file(config: GenACTracesConfig, model_name_or_path: str) -> None:
    """Write the data set of a file of traces, for which no policy is needed, only the critic's tokenizer."""
    from transformers import AutoTokenizer

    summary = write_dataset(
        read_rows(Path(str(config.oracle))),
        Path(str(config.output_dir)) / "dataset",
        AutoTokenizer.from_pretrained(config.critic_model_name_or_path or model_name_or_path),
        config.min_trace_length,
        config.critic_max_completion_length,
        config.max_disagreement,
    )
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    arguments = make_parser().parse_args_and_config(fail_with_unknown_args=False)
    _, training_args, model_args, _ = arguments
    if training_args.is_file:
        if training_args.process_index == 0:
            filter_file(training_args, model_args.model_name_or_path)
    else:
        run_grpo_script(TraceCollector, *arguments)
