"""
Train an agent with SAO: it guesses a number with a tool of an environment, one game per prompt, and each turn has a
reward of its own.

    python examples/sao_agent.py --model Qwen/Qwen3-0.6B

With vLLM, whose log-probabilities are then those of the sampler:

    python examples/sao_agent.py --model Qwen/Qwen3-0.6B --use_vllm --vllm_mode colocate

Every option of `SAOConfig` is a flag: `--time_step token`, `--critic_pretraining_steps 100`, ... (`--help` lists them).
The model must have learned to call tools. With transformers before 5.13 it needs `pip install jmespath`.
"""

import random
from dataclasses import dataclass, field

from datasets import Dataset
from trl import TrlParser

from trl_credit import SAOConfig, SAOTrainer


HIGHEST = 100
TASK = f"I think of a whole number from 1 to {HIGHEST}. Find it with the tool `guess`, in as few guesses as you can."
# What the answers of the environment are worth, beside the cost of a turn that asks for one.
RIGHT, KNOWN = "That is it.", "You could have known that."
WORTH = {RIGHT: 1.0, KNOWN: -0.2}
COST = -0.05


@dataclass
class ScriptArguments:
    model: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Model id or folder."})
    games: int = field(default=2000, metadata={"help": "Prompts of the dataset."})


class Game:
    """One game. TRL resets it for every completion; its public methods are the tools of the policy."""

    def reset(self, secret: int, **kwargs) -> None:
        self.secret, self.low, self.high = secret, 1, HIGHEST

    def guess(self, number: int) -> str:
        """
        Guesses the number.

        Args:
            number: The guess.

        Returns:
            Whether that is it, or whether the number is higher or lower.
        """
        if number == self.secret:
            return RIGHT
        if not self.low <= number <= self.high:
            return KNOWN
        if number < self.secret:
            self.low = number + 1
            return "It is higher."
        self.high = number - 1
        return "It is lower."


def worth_of_turns(completions, **kwargs) -> list[list[float]]:
    """A reward for each turn, a message of the assistant: what it costs, and what the tool's answers are worth."""
    rewards = []
    for completion in completions:
        turns: list[float] = []
        for message in completion:
            if message["role"] == "assistant":
                turns.append(COST if message.get("tool_calls") else 0.0)
            else:
                turns[-1] += WORTH.get(message["content"], 0.0)
        rewards.append(turns)
    return rewards


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SAOConfig))
    # A turn is one step of the credit: γ, λ and the length-adaptive λ count turns.
    parser.set_defaults(time_step="turn", max_completion_length=1024, output_dir="sao-agent")
    script_args, training_args = parser.parse_args_and_config()
    secrets = random.Random(0)
    games = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": TASK}], "secret": secrets.randint(1, HIGHEST)}
            for _ in range(script_args.games)
        ]
    )
    trainer = SAOTrainer(
        model=script_args.model,
        args=training_args,
        reward_funcs=worth_of_turns,
        train_dataset=games,
        environment_factory=Game,
    )
    trainer.train()
    trainer.save_model()  # the policy in `output_dir`, the critic in its folder `critic`
