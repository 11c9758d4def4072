"""
Train with SPPO: one completion a prompt, and a critic that reads the prompt alone. On one GPU, with a small critic of
another family and LoRA for the policy:

    python examples/sppo.py --lora --critic_model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct

On several GPUs, with ZeRO-3 for both networks (`zero3.yaml`: any accelerate config, e.g. one of TRL's):

    accelerate launch --config_file zero3.yaml examples/sppo.py --model Qwen/Qwen2.5-7B-Instruct \\
        --critic_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct

With vLLM for generation, on the same GPUs or on a server (`trl vllm-serve --model ...`):

    python examples/sppo.py --use_vllm --vllm_mode colocate
    python examples/sppo.py --use_vllm --vllm_mode server

Every option of `SPPOConfig` is a flag: `--critic_loss mse`, `--reward_range -1 1`, ... (`--help` lists them).
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import TrlParser
from trl.rewards import accuracy_reward

from trl_credit import SPPOConfig, SPPOTrainer


@dataclass
class ScriptArguments:
    model: str = field(default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Model id or folder."})
    dataset: str = field(
        default="trl-lib/DeepMath-103K",
        metadata={"help": "Dataset id or folder with the columns `prompt` (a conversation) and `solution`."},
    )
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter of the policy instead of all weights."})


if __name__ == "__main__":
    script_args, training_args = TrlParser((ScriptArguments, SPPOConfig)).parse_args_and_config()
    trainer = SPPOTrainer(
        model=script_args.model,
        args=training_args,
        reward_funcs=accuracy_reward,
        train_dataset=load_dataset(script_args.dataset, split="train"),
        peft_config=LoraConfig(target_modules="all-linear") if script_args.lora else None,
    )
    trainer.train()
    trainer.save_model()  # the policy in `output_dir`, the critic and its tokenizer in its folder `critic`
    if training_args.push_to_hub:
        # The Hub refuses cards that name a dataset by a folder.
        trainer.push_to_hub(dataset_name=None if Path(script_args.dataset).exists() else script_args.dataset)
