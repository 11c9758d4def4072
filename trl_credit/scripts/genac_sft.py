"""What `trl-credit genac-sft` runs in each process: the script of `trl sft`, which learns whole traces and no more."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trl import SFTConfig, SFTTrainer

from trl_credit.critics.facts import FACTS_FILE
from trl_credit.critics.generative.question import end_of_turn
from trl_credit.options import Options
from trl_credit.seam.scripts import reader_of, run_sft_script


_WHOLE = "has no use: the loss is that of whole traces, whose score comes last"


@dataclass
class GenACSFTConfig(Options, SFTConfig):
    """
    [`~trl.SFTConfig`] for the traces of an oracle: the loss is that of the critic's tokens, and none of them is cut.

    A trace that is cut has lost its score, and a prompt that fills the sequence leaves nothing to learn, so
    `max_length` is `None` and `packing`, which needs it, is refused. To leave out long traces, do so in the dataset:
    `trl-credit genac-traces --critic_max_completion_length`.

    Args:
        max_length (`int`, *optional*):
            Not used: a trace that is cut has lost its score.
        completion_only_loss (`bool`, *optional*, defaults to `True`):
            Always true: the critic learns the traces, not the problems.
    """

    restricted = {
        "max_length": ((None,), _WHOLE),
        "packing": ((False,), _WHOLE),
        "completion_only_loss": ((True,), _WHOLE),
    }

    max_length: int | None = None
    completion_only_loss: bool | None = True

    def __post_init__(self):
        super().__post_init__()
        self.check_restricted()


class CriticSFTTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] that takes nothing but prompts and completions, of which it learns the completions. What stage 1
    says in `critic.json` of the question that they answer is passed on beside the model.
    """

    # The folder of traces that is the dataset, if it is one.
    traces: ClassVar[str | None] = None

    def __init__(self, model, args=None, data_collator=None, train_dataset=None, **kwargs):
        columns = getattr(train_dataset, "column_names", None) or []
        if not {"prompt", "completion"} <= set(columns):
            raise ValueError(
                f"The data must have the columns `prompt` and `completion`, as `trl-credit genac-traces` writes them; "
                f"got {columns}."
            )
        super().__init__(model, args, data_collator, train_dataset, **kwargs)
        tokenizer: Any = self.processing_class
        if tokenizer.chat_template is not None and end_of_turn(tokenizer) is None:
            raise ValueError(
                f"The chat template of the critic's {type(tokenizer).__name__} ends an assistant's turn with no "
                "special token: the critic would never learn to stop. Give it one that does."
            )

    def save_model(self, output_dir=None, _internal_call=False):
        """As TRL's; `critic.json` goes along."""
        super().save_model(output_dir, _internal_call)
        facts = Path(self.traces or "", FACTS_FILE)
        if self.traces and facts.is_file() and self.args.should_save:
            shutil.copy(facts, str(output_dir or self.args.output_dir))


def make_parser(prog: str | None = None):
    """The parser of `trl sft` with what traces need for defaults."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    classes: tuple = (ScriptArguments, GenACSFTConfig, ModelConfig, DatasetMixtureConfig)
    return TrlParser(classes, prog=prog, allow_abbrev=False)


if __name__ == "__main__":
    arguments = make_parser().parse_args_and_config(fail_with_unknown_args=False)
    traces = arguments[0].dataset_name
    CriticSFTTrainer.traces = str(Path(traces).parent) if reader_of(traces) else traces
    run_sft_script(CriticSFTTrainer, *arguments)
