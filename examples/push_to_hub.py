"""
Train with GRPO-λ and publish the model: weights, tokenizer and a model card with the settings of the run.

    hf auth login
    python examples/push_to_hub.py --model Qwen/Qwen2.5-0.5B-Instruct --hub_model_id my-name/my-model

Every option of `GRPOLambdaConfig` is a flag: `--trace_lambda 0.95`, `--hub_strategy all_checkpoints`,
`--hub_private_repo`, ... (`--help` lists them). With `--lora` an adapter is trained and published.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import TrlParser
from trl.rewards import accuracy_reward, get_soft_overlong_punishment

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer


@dataclass
class ScriptArguments:
    model: str = field(default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Model id or folder."})
    dataset: str = field(
        default="trl-lib/DeepMath-103K",
        metadata={"help": "Dataset id or folder with the columns `prompt` (a conversation) and `solution`."},
    )
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})


if __name__ == "__main__":
    script_args, training_args = TrlParser((ScriptArguments, GRPOLambdaConfig)).parse_args_and_config()
    training_args.push_to_hub = True  # creates the repository before training, so a wrong token shows at once

    length = training_args.max_completion_length
    trainer = GRPOLambdaTrainer(
        model=script_args.model,
        args=training_args,
        reward_funcs=[accuracy_reward, get_soft_overlong_punishment(length, soft_punish_cache=length // 2)],
        train_dataset=load_dataset(script_args.dataset, split="train"),
        peft_config=LoraConfig(target_modules="all-linear") if script_args.lora else None,
    )
    trainer.train()

    # Saves to `output_dir` first: should the upload fail, the model is there, and
    # `hf upload my-name/my-model <output_dir> --exclude "checkpoint-*"` sends it later.
    # The Hub refuses cards that name a dataset by a folder.
    trainer.push_to_hub(dataset_name=None if Path(script_args.dataset).exists() else script_args.dataset)
