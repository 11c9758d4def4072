"""What the tests of this folder train, and what they look at."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer


# Between two implementations of one model in float32. A training step moves the numbers by thousands of times as much.
SAME = 1e-4
SETTINGS = {
    "use_vllm": True,
    "vllm_gpu_memory_utilization": 0.1,
    "vllm_max_model_length": 128,
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "max_completion_length": 16,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "bf16": False,
    "use_cpu": not torch.cuda.is_available(),  # without it accelerate runs two processes as one and one
    "report_to": [],
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
PROMPTS = ["ab", "cd ef", "a", "b c d", "fgh", "x y", "zzz", "q"]


def distinct_letters(completions, **kwargs):
    return [len(set(completion)) / 10 for completion in completions]


def make_trainer(
    model_dir, output_dir, trainer_class=GRPOLambdaTrainer, config_class=GRPOLambdaConfig, peft_config=None, **settings
):
    """A trainer on a tiny task, which keeps its rollouts in `rollouts_seen`."""
    trainer = trainer_class(
        model=str(model_dir),
        reward_funcs=distinct_letters,
        args=config_class(str(output_dir), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=peft_config,
    )
    trainer.rollouts_seen = []
    generate = trainer._generate_and_score_completions

    def generate_and_keep(inputs):
        trainer.rollouts_seen.append(generate(inputs))
        return dict(trainer.rollouts_seen[-1])

    trainer._generate_and_score_completions = generate_and_keep
    return trainer


def steps(trainer) -> list[dict]:
    """What was logged at each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logp_gap(trainer, model=None) -> float:
    """Largest difference between vLLM's log-probabilities of what it generates now and a model's, the trained one's."""
    model = model or trainer.accelerator.unwrap_model(trainer.model).eval()
    prompts, completions, logps, _ = trainer.vllm_generation.generate(
        trainer.processing_class(PROMPTS)["input_ids"], images=None, num_generations=1
    )
    gap = 0.0
    for prompt, completion, logp in zip(prompts, completions, logps, strict=True):
        ids = torch.tensor([list(prompt) + list(completion)], device=model.device)
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        expected = logits.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        gap = max(gap, (expected.cpu() - torch.tensor(logp).squeeze(1)).abs().max().item())
    return gap


def example_command(model_dir, dataset, output_dir, vllm_mode: str, script="grpo_lambda_vllm.py", **flags) -> list[str]:
    """An example, on a tiny model and the problems of a file, for two steps."""
    flags = {
        "model": model_dir,
        "dataset": dataset,
        "output_dir": output_dir,
        "vllm_mode": vllm_mode,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 8,
        "logging_steps": 1,
        "save_steps": 2,
        "bf16": False,
        "report_to": "none",
        **flags,
    }
    return [f"examples/{script}", *(f"--{name}={value}" for name, value in flags.items())]


def assert_example_trained(model_dir: Path, output_dir: Path) -> list[dict]:
    """Returns what the example logged at each step."""
    log = json.loads((output_dir / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in log] == [1, 2]
    for entry in log:
        assert "sampling/sampling_logp_difference/max" in entry, "log-probabilities of a sampler: vLLM generated"
        assert entry["rewards/accuracy_reward/mean"] == 0, "a random model solves nothing"
        assert entry["rewards/unscored"] == 0
    assert any(entry["grad_norm"] > 0 for entry in log)
    AutoModelForCausalLM.from_pretrained(output_dir)
    start, end = (load_file(folder / "model.safetensors") for folder in (model_dir, output_dir))
    assert all(not torch.equal(start[name], end[name]) for name in start)
    return log
