"""
Train on grade-school mathematics with GRPO-λ, while vLLM generates.

Colocate: vLLM shares the GPUs with the training.

    accelerate launch examples/grpo_lambda_vllm.py --vllm_mode colocate --vllm_gpu_memory_utilization 0.3

Server: vLLM has GPUs of its own, two or more in all. Start it first, and leave it running:

    CUDA_VISIBLE_DEVICES=0 VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen2.5-0.5B-Instruct \\
        --weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs --max-logprobs -1
    CUDA_VISIBLE_DEVICES=1 accelerate launch examples/grpo_lambda_vllm.py --vllm_mode server

Every option of `GRPOLambdaConfig` is a flag (`--help` lists them). It needs `pip install 'trl-credit[math,vllm]'`.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import TrlParser
from trl.rewards import accuracy_reward, get_soft_overlong_punishment

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer


INSTRUCTION = "Solve the problem step by step and put the final answer in \\boxed{}."


@dataclass
class ScriptArguments:
    model: str = field(
        default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "Model id or folder; the same as the server's."}
    )
    dataset: str = field(
        default="openai/gsm8k",
        metadata={"help": "GSM8K, or a .jsonl file with its columns: `question` and `answer`, which ends in #### 42."},
    )


def load_gsm8k(name: str):
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
    parser.set_defaults(output_dir="gsm8k-grpo-lambda", max_completion_length=512, logging_steps=10, use_vllm=True)
    script_args, training_args = parser.parse_args_and_config()

    length = training_args.max_completion_length
    trainer = GRPOLambdaTrainer(
        model=script_args.model,
        args=training_args,
        # The answer counts, and an end before the length runs out.
        reward_funcs=[accuracy_reward, get_soft_overlong_punishment(length, soft_punish_cache=length // 2)],
        train_dataset=load_gsm8k(script_args.dataset),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
