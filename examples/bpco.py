"""
Train with BPCO on mathematics: one completion a prompt, and a critic that is told the reference answer, which the
policy never sees:

    python examples/bpco.py

With vLLM, whose log-probabilities are then those of the sampler:

    python examples/bpco.py --use_vllm --vllm_mode colocate

Every option of `BPCOConfig` is a flag: `--critic_prompt_template "{prompt}"` for a critic that reads what the policy
reads, `--trust_region clip`, `--critic_loss mse`, ... (`--help` lists them).
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import TrlParser
from trl.rewards import accuracy_reward

from trl_credit import BPCOConfig, BPCOTrainer


@dataclass
class ScriptArguments:
    model: str = field(default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Model id or folder."})
    dataset: str = field(
        default="trl-lib/DeepMath-103K",
        metadata={"help": "Dataset id or folder with the columns `prompt` (a conversation) and `solution`."},
    )


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, BPCOConfig))
    parser.set_defaults(critic_prompt_template="{prompt}\n\nReference answer: {solution}")
    script_args, training_args = parser.parse_args_and_config()
    trainer = BPCOTrainer(
        model=script_args.model,
        args=training_args,
        reward_funcs=accuracy_reward,
        train_dataset=load_dataset(script_args.dataset, split="train"),
    )
    trainer.train()
    trainer.save_model()  # the policy in `output_dir`, the critic in its folder `critic`
