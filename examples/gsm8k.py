"""
Train a model on grade-school mathematics with GRPO-λ, rewarded for the right answer only.

    python examples/gsm8k.py --model Qwen/Qwen2.5-0.5B-Instruct --output_dir gsm8k-grpo-lambda

With `--lora` a LoRA adapter is trained, which takes a fraction of the memory. Every option of `GRPOLambdaConfig` is a
flag (`--help` lists them), for instance `--trace_lambda 0.98 --learning_rate 2e-6 --logging_steps 1`. For several GPUs
or machines put `accelerate launch` in front, see examples/README.md. It needs `pip install 'trl-credit[math,peft]'`.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig
from trl import TrlParser
from trl.rewards import accuracy_reward

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer


INSTRUCTION = "Solve the problem step by step and put the final answer in \\boxed{}."


@dataclass
class ScriptArguments:
    model: str = field(default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Model id or folder."})
    dataset: str = field(
        default="openai/gsm8k",
        metadata={"help": "GSM8K, or a .jsonl file with its columns: `question` and `answer`, which ends in #### 42."},
    )
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})


def load_gsm8k(name: str = "openai/gsm8k"):
    """The problems as TRL wants them: a conversation in `prompt`, and in `solution` what `accuracy_reward` compares."""
    if name.endswith(".jsonl"):
        dataset = load_dataset("json", data_files=name, split="train")
    else:
        dataset = load_dataset(name, "main", split="train")

    def convert(row):
        return {
            "prompt": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": row["question"]}],
            "solution": row["answer"].split("####")[-1].strip().replace(",", ""),
        }

    return dataset.map(convert, remove_columns=dataset.column_names)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, GRPOLambdaConfig))
    parser.set_defaults(output_dir="gsm8k-grpo-lambda", max_completion_length=512, logging_steps=10)
    script_args, training_args = parser.parse_args_and_config()

    trainer = GRPOLambdaTrainer(
        model=script_args.model,
        args=training_args,
        reward_funcs=accuracy_reward,
        train_dataset=load_gsm8k(script_args.dataset),
        peft_config=LoraConfig(target_modules="all-linear") if script_args.lora else None,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
