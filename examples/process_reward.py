"""
Train with rewards for single steps of a solution: of every line with an equation the arithmetic is checked, and what is
found falls on the last token of the line. The answer is rewarded as usual.

    python examples/process_reward.py

A process reward model takes the place of `checked_lines`: any function that returns, for a completion, a list with a
number for each token, `None` where it has nothing to say. Every option of `VAPOConfig` is a flag (`--help` lists them).
It needs `pip install 'trl-credit[math]'`.
"""

import re
from dataclasses import dataclass, field

from gsm8k import load_gsm8k
from transformers import AutoTokenizer
from trl import TrlParser
from trl.rewards import accuracy_reward

from trl_credit import VAPOConfig, VAPOTrainer


EQUATION = re.compile(r"(-?\d+(?:\.\d+)?) ?([-+*/×÷]) ?(-?\d+(?:\.\d+)?) ?= ?\$?(-?\d+(?:\.\d+)?)")
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "×": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else float("nan"),
    "÷": lambda a, b: a / b if b else float("nan"),
}


@dataclass
class ScriptArguments:
    model: str = field(default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Model id or folder."})
    dataset: str = field(
        default="openai/gsm8k",
        metadata={"help": "GSM8K, or a .jsonl file with its columns: `question` and `answer`, which ends in #### 42."},
    )


def worth_of_line(line: str) -> float | None:
    """0.1 for true equations, -0.1 if one of them is false, nothing without any."""
    equations = EQUATION.findall(line)
    if not equations:
        return None
    are_true = [abs(OPERATIONS[op](float(a), float(b)) - float(c)) < 0.01 for a, op, b, c in equations]
    return 0.1 if all(are_true) else -0.1


def checked_lines(tokenizer):
    """The reward function. What a token adds to the text says where lines end."""

    def reward(completion_ids, **kwargs) -> list[list[float | None]]:
        rewards = []
        for ids in completion_ids:
            of_tokens: list[float | None] = [None] * len(ids)
            line = ""
            for position, piece in enumerate(tokenizer.batch_decode([[token] for token in ids])):
                line += piece
                if "\n" in piece or position + 1 == len(ids):
                    of_tokens[position] = worth_of_line(line)
                    line = ""
            rewards.append(of_tokens)
        return rewards

    reward.__name__ = "checked_lines"
    return reward


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, VAPOConfig))
    parser.set_defaults(output_dir="process-reward", max_completion_length=512)
    script_args, training_args = parser.parse_args_and_config()
    trainer = VAPOTrainer(
        model=script_args.model,
        args=training_args,
        reward_funcs=[accuracy_reward, checked_lines(AutoTokenizer.from_pretrained(script_args.model))],
        train_dataset=load_gsm8k(script_args.dataset),
    )
    trainer.train()
    trainer.save_model()
