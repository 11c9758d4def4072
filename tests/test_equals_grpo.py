"""Configurations that must give the same trajectory, give it."""

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer


def distinct_letters(completions, **kwargs):
    return [len(set(completion)) / 10 for completion in completions]


def train(trainer_class, config_class, model_dir, tmp_path, lora=False, **settings):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    kwargs = {}
    if lora:
        from peft import LoraConfig

        kwargs["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = trainer_class(
        model=model_dir,
        reward_funcs=distinct_letters,
        args=config_class(str(tmp_path), **settings),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "cd ef", "a", "b c d", "fgh", "x y", "zzz", "q"]}),
        **kwargs,
    )
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    moved = [not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), start, strict=True)]
    assert moved == [p.requires_grad for p in trainer.model.parameters()], "every trained parameter moves, no other"
    return trainer


def history(trainer):
    return [
        {key: value for key, value in entry.items() if key not in ("step_time",) and not key.startswith("rewards/uns")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_no_trace_and_no_clamp_is_grpo_bit_for_bit(model_dir, tmp_path, num_iterations, beta, loss_type):
    settings = {"num_iterations": num_iterations, "beta": beta, "loss_type": loss_type}
    check_bit_for_bit(model_dir, tmp_path, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"trace_style": "both"},
        {"trace_update": "weight"},
        {"trace_lambda": 0.9, "gamma": 0.0},
        {"lora": True},
        {"lora": True, "beta": 0.04, "num_iterations": 2},
        {"importance_sampling_level": "sequence", "num_iterations": 2, "loss_type": "grpo"},
        {"gradient_accumulation_steps": 2, "entropy_coef": 0.01, "top_entropy_quantile": 0.5},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()),
)
@pytest.mark.slow
def test_no_trace_is_grpo_whatever_the_other_options_say(model_dir, tmp_path, settings):
    check_bit_for_bit(model_dir, tmp_path, settings)


def check_bit_for_bit(model_dir, tmp_path, settings):
    ours = {"trace_lambda": 0.0, "min_advantage": None, **settings}
    theirs = {k: v for k, v in settings.items() if not k.startswith(("trace_", "gamma"))}
    traced = train(GRPOLambdaTrainer, GRPOLambdaConfig, model_dir, tmp_path, **ours)
    grpo = train(GRPOTrainer, GRPOConfig, model_dir, tmp_path, **theirs)
    assert history(traced) == history(grpo)
    assert all("grad_norm" in entry for entry in history(traced))
    for (name, p), q in zip(traced.model.named_parameters(), grpo.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"trace_lambda": 0.0, "min_advantage": None},
        {"trace_lambda": 0.9},
        {"trace_lambda": 0.9, "trace_style": "both", "num_iterations": 2, "beta": 0.04},
        {"trace_lambda": 0.9, "trace_update": "weight", "loss_type": "grpo"},
        {"trace_lambda": 0.9, "loss_type": "dr_grpo", "trace_normalization": "mean"},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()),
)
def test_eight_micro_batches_of_one_are_one_batch_of_eight(model_dir, tmp_path, settings):
    # SGD: Adam divides by the gradient's size, which makes rounding errors of tiny gradients large.
    common = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1.0, "max_steps": 4, **settings}
    whole = train(GRPOLambdaTrainer, GRPOLambdaConfig, model_dir, tmp_path, per_device_train_batch_size=8, **common)
    parts = train(
        GRPOLambdaTrainer,
        GRPOLambdaConfig,
        model_dir,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        **common,
    )
    for a, b in zip(history(whole), history(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5, abs=1e-5)
        for name in {"trace/weight_first", "trace/weight_mean", "trace/value_gap_bound_mean", "approx_kl"} & set(a):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), "a mean over tokens, not over micro-batches"
    for (name, p), q in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5, name


def test_clamp_alone_changes_only_negative_advantages(model_dir, tmp_path):
    trainer = train(
        GRPOLambdaTrainer, GRPOLambdaConfig, model_dir, tmp_path, trace_lambda=0.0, min_advantage=-0.1, max_steps=1
    )
    plain = train(GRPOTrainer, GRPOConfig, model_dir, tmp_path, max_steps=1)
    clamped = [max(a, -0.1) for a in plain._logs["advantages"]]
    assert list(trainer._logs["advantages"]) == pytest.approx(clamped)
    assert min(plain._logs["advantages"]) < -0.5
