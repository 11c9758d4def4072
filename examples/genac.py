"""
Train with GenAC: segment-level advantages from a critic that reasons before it gives a value. The critic is the one
that the first two stages have made (`trl-credit genac-sft`, `trl-credit genac-pretrain`):

    python examples/genac.py --critic_model_name_or_path genac-critic

On several GPUs, with ZeRO-3 for both networks (`zero3.yaml`: any accelerate config, e.g. one of TRL's):

    accelerate launch --config_file zero3.yaml examples/genac.py --critic_model_name_or_path genac-critic

With vLLM for the completions and, in the same engine, for the critic's answers, on the same GPUs:

    python examples/genac.py --critic_model_name_or_path genac-critic \\
        --use_vllm --vllm_mode colocate --vllm_enable_sleep_mode

Every option of `GenACConfig` is a flag: `--segment_target_length 200`, `--critic_baseline leave_one_out`, ... (`--help`
lists them).
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import TrlParser
from trl.rewards import accuracy_reward

from trl_credit import GenACConfig, GenACTrainer


@dataclass
class ScriptArguments:
    model: str = field(default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Model id or folder."})
    dataset: str = field(
        default="trl-lib/DeepMath-103K",
        metadata={"help": "Dataset id or folder with the columns `prompt` (a conversation) and `solution`."},
    )
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter of the policy instead of all weights."})


if __name__ == "__main__":
    script_args, training_args = TrlParser((ScriptArguments, GenACConfig)).parse_args_and_config()
    trainer = GenACTrainer(
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
