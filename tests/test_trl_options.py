"""TRL's own options, with traces on: each does what it says, in numbers that would be others if it were ignored."""

import importlib.resources
import json
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from datasets import Dataset
from test_grpo_lambda import LENGTH, ROWS, logged, make_rollout, make_trainer, policy_logps
from test_traces import dense_trace
from tiny import tiny_model_dir, tiny_vision_language_model
from trl import GRPOTrainer

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer
from trl_credit.trainers.grpo_lambda.grpo_lambda_config import TRACED_LOSS_TYPES


DECAY = 0.9
PROMPTS = ["ab", "cd ef", "a", "b c d"]


# --- The loss, with ratios of all kinds


def dense_loss(trainer, rollout) -> float:
    """TRL's loss, called directly, where the log-ratio is one traced by a dense matrix in float64."""
    logps = policy_logps(trainer.model, rollout, trainer.temperature).detach()
    mask = rollout["completion_mask"] * rollout["tool_mask"]
    traced = torch.zeros_like(logps)
    for b in range(ROWS):
        tokens = mask[b].nonzero()[:, 0]
        gap = (logps - rollout["old_per_token_logps"])[b, tokens]
        traced[b, tokens] = dense_trace(len(tokens), DECAY) @ gap
    inputs = {"sampling_per_token_logps": rollout["old_per_token_logps"], **rollout}
    inputs["old_per_token_logps"] = (logps - traced).float()
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs).item()


@pytest.mark.parametrize(
    "settings",
    [
        {"entropy_coef": 0.5},
        {"entropy_coef": 0.5, "top_entropy_quantile": 0.5},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": -1.0},
        {"delta": 1.4, "epsilon_high": 2.0},
        {"delta": 1.4, "epsilon_high": 2.0, "loss_type": "luspo"},
        {"top_entropy_quantile": 0.5, "loss_type": "sapo"},
        {"off_policy_mask_threshold": -1.0, "loss_type": "dr_grpo"},
        {"entropy_coef": 0.5, "loss_type": "bnpo"},
        {"off_policy_mask_threshold": -1.0, "importance_sampling_level": "sequence", "loss_type": "grpo"},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()),
)
def test_option_acts_on_the_traced_loss_as_on_trls(model_dir, tmp_path, settings):
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=DECAY, **settings)
    rollout = make_rollout(trainer, off_policy=True)
    loss = trainer._compute_loss(trainer.model, rollout).item()
    assert loss == pytest.approx(dense_loss(trainer, rollout), rel=1e-4, abs=1e-6)

    ignored = {
        name: settings[name] for name in ("epsilon_high", "loss_type", "importance_sampling_level") if name in settings
    }
    without = make_trainer(model_dir, tmp_path, trace_lambda=DECAY, **ignored)
    assert abs(loss - without._compute_loss(without.model, rollout).item()) > 1e-3


def test_off_policy_mask_goes_by_the_true_log_probabilities(model_dir, tmp_path):
    """Mean of old - new log-probability, plain: the traced one is up to ten times as large."""
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=DECAY)
    rollout = make_rollout(trainer, off_policy=True)
    mask = rollout["completion_mask"] * rollout["tool_mask"]
    gap = (rollout["old_per_token_logps"] - policy_logps(trainer.model, rollout, 1.0).detach()) * mask
    kl = gap[1].sum() / mask[1].sum()  # row 1 is the one with a negative advantage
    dropped = []
    for threshold in (kl.item() - 1e-4, kl.item() + 1e-4):
        trainer.off_policy_mask_threshold = threshold
        trainer.model.zero_grad()
        inputs = rollout | {"advantages": torch.tensor([0.0, -1.0, 0.0, 0.0])}
        trainer._compute_loss(trainer.model, inputs).backward()
        dropped.append(all(not p.grad.any() for p in trainer.model.parameters()))
    assert dropped == [True, False]


def test_sampler_correction_multiplies_the_traced_loss(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, trace_lambda=DECAY)
    rollout = make_rollout(trainer, off_policy=True)
    plain = trainer._compute_loss(trainer.model, rollout).item()
    rollout["importance_sampling_ratio"] = torch.linspace(0.2, 2.0, ROWS * LENGTH).view(ROWS, LENGTH)
    trainer.use_vllm = True  # the loss is that of a run with vLLM, whose correction comes with the rollout
    corrected = trainer._compute_loss(trainer.model, rollout).item()
    assert corrected == pytest.approx(dense_loss(trainer, rollout), rel=1e-4)
    assert abs(corrected - plain) > 1e-2


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_without_advantages_kl_is_all_there_is_and_it_is_trls(model_dir, tmp_path, bias_correction, loss_type):
    trainer = make_trainer(
        model_dir,
        tmp_path,
        trace_lambda=DECAY,
        beta=0.04,
        use_bias_correction_kl=bias_correction,
        loss_type=loss_type,
    )
    rollout = make_rollout(trainer, off_policy=True) | {"advantages": torch.zeros(ROWS)}
    losses, grads = [], []
    for compute_loss in (trainer._compute_loss, lambda *args: GRPOTrainer._compute_loss(trainer, *args)):
        trainer.model.zero_grad()
        loss = compute_loss(trainer.model, rollout)
        loss.backward()
        losses.append(loss.item())
        grads.append([p.grad.clone() for p in trainer.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 1e-4
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.04], ids="beta={}".format)
def test_router_loss_counts_once(moe_dir, tmp_path, beta):
    trainer = make_trainer(moe_dir, tmp_path, trace_lambda=DECAY, beta=beta, use_bias_correction_kl=True)
    rollout = make_rollout(trainer, off_policy=True)
    loss = trainer._compute_loss(trainer.model, rollout).item()
    aux_loss = logged(trainer)["aux_loss"]
    trainer.aux_loss_enabled = False
    assert aux_loss > 1
    assert loss - trainer._compute_loss(trainer.model, rollout).item() == pytest.approx(0.1 * aux_loss, rel=1e-4)


# --- Training


def distinct_letters(completions, **kwargs):
    return [len(set(completion)) / 10 for completion in completions]


class Recorder(GRPOLambdaTrainer):
    """Remembers the micro-batches that losses were computed for."""

    def _compute_loss(self, model, inputs):
        self.__dict__.setdefault("inputs", []).append(inputs)
        return super()._compute_loss(model, inputs)


def make(model, tmp_path, reward_funcs=distinct_letters, train_dataset=None, trainer_kwargs=None, **settings):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "trace_lambda": DECAY,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    return Recorder(
        model=model,
        reward_funcs=reward_funcs,
        args=GRPOLambdaConfig(str(tmp_path), **settings),
        train_dataset=train_dataset or Dataset.from_dict({"prompt": PROMPTS}),
        **trainer_kwargs or {},
    )


def train(*args, still=(), **kwargs):
    """Train; all that is trained moves (but for parameters named in `still`), nothing else does."""
    trainer = make(*args, **kwargs)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        assert p.isfinite().all(), name
        if not any(part in name for part in still):
            assert torch.equal(p, start[name]) != p.requires_grad, name
    return trainer


def history(trainer, *names) -> list[dict]:
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if (k in names if names else k != "step_time")} for entry in entries]


def weights_by_hand(inputs) -> tuple[float, float]:
    """First and mean weight of a micro-batch: (1 - a^n) / (1 - a) for a token with n trained ones from it on."""
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    left = mask.flip(1).cumsum(1).flip(1) * mask
    weights = (1 - DECAY**left) / (1 - DECAY)
    return weights.max(1).values[mask.any(1)].mean().item(), (weights.sum() / mask.sum()).item()


def assert_weights_are_those_of_trained_tokens(trainer):
    for entry, inputs in zip(history(trainer), trainer.inputs, strict=True):
        first, mean = weights_by_hand(inputs)
        assert entry["trace/weight_first"] == pytest.approx(first, rel=1e-5)
        assert entry["trace/weight_mean"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRACED_LOSS_TYPES)
def test_every_loss_type_trains(model_dir, tmp_path, loss_type, level):
    trainer = train(model_dir, tmp_path, loss_type=loss_type, importance_sampling_level=level, num_iterations=2)
    assert_weights_are_those_of_trained_tokens(trainer)
    assert [entry["approx_kl"] > 1e-6 for entry in history(trainer)] == [False, True]
    clipped = {"cispo": {"cispo_clip_ratio"}, "sapo": set()}.get(loss_type, {"clip_ratio/region_mean"})
    for entry in history(trainer):
        assert clipped | {f"trace/{name}" for name in clipped} <= set(entry)
        assert clipped or not any("clip_ratio" in name for name in entry)


@pytest.mark.parametrize("beta", [0.0, 0.04], ids="beta={}".format)
def test_adaptive_entropy_coefficient_moves_once_a_step(model_dir, tmp_path, beta):
    adaptive = {"entropy_target": 100.0, "entropy_coef_delta": 0.01, "entropy_coef_max": 1.0}
    trainer = train(
        model_dir,
        tmp_path,
        use_adaptive_entropy=True,
        max_steps=3,
        gradient_accumulation_steps=2,
        beta=beta,
        use_bias_correction_kl=True,
        **adaptive,
    )
    assert [entry["entropy_coef"] for entry in history(trainer)] == pytest.approx([0.01, 0.02, 0.03])


@pytest.mark.parametrize(
    ("settings", "rollouts"),
    [({"num_iterations": 2}, 2), ({"steps_per_generation": 4}, 1), ({"steps_per_generation": 2}, 2), ({}, 4)],
    ids=str,
)
def test_one_rollout_serves_several_steps(model_dir, tmp_path, settings, rollouts):
    trainer = train(model_dir, tmp_path, max_steps=4, **settings)
    assert sum("num_tokens" in entry for entry in history(trainer)) == rollouts
    off_policy = [entry["approx_kl"] > 1e-6 for entry in history(trainer)]
    assert off_policy == [step % (4 // rollouts) > 0 for step in range(4)]


def test_async_rewards_train_as_plain_ones(model_dir, tmp_path):
    async def later(completions, **kwargs):
        return distinct_letters(completions)

    later.__name__ = distinct_letters.__name__
    plain, waited = train(model_dir, tmp_path), train(model_dir, tmp_path, reward_funcs=[later])
    assert history(plain) == history(waited)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_rewards_are_weighed_scaled_and_clamped(model_dir, tmp_path, scale_rewards):
    def some(completions, **kwargs):
        return [None, 10.0, None, 2.0] * 2

    def all_of_them(completions, **kwargs):
        return [0.0, 1.0, 2.0, 5.0] + [0.0, 0.0, 4.0, 0.0]

    trainer = make(
        model_dir,
        tmp_path,
        reward_funcs=[some, all_of_them],
        reward_weights=[0.5, 2.0],
        per_device_train_batch_size=8,
        scale_rewards=scale_rewards,
        max_steps=1,
    )
    trainer.train()
    rewards = torch.tensor([[0.0, 7.0, 4.0, 11.0], [0.0, 5.0, 8.0, 1.0]])  # 0.5 · some + 2 · all of them
    spread = {"group": rewards.std(1, keepdim=True), "batch": rewards.std(), "none": 1.0}[scale_rewards]
    expected = ((rewards - rewards.mean(1, keepdim=True)) / spread).clamp(min=-0.1)
    assert list(trainer._logs["advantages"]) == pytest.approx(expected.flatten().tolist(), abs=1e-3)
    (entry,) = history(trainer)
    assert entry["reward"] == pytest.approx(rewards.mean().item())
    assert (entry["rewards/some/mean"], entry["rewards/all_of_them/mean"]) == (6.0, 1.5)
    assert entry["rewards/unscored"] == 0


def test_rewards_can_be_normalized_before_they_are_summed(model_dir, tmp_path):
    trainer = make(
        model_dir,
        tmp_path,
        reward_funcs=[lambda completions, **_: [0.0, 1.0, 2.0, 3.0], lambda completions, **_: [9.0, 0.0, 0.0, 0.0]],
        multi_objective_aggregation="normalize_then_sum",
        max_steps=1,
    )
    trainer.train()
    rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0], [9.0, 0.0, 0.0, 0.0]])
    total = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).sum(0)
    expected = ((total - total.mean()) / total.std()).clamp(min=-0.1)
    assert list(trainer._logs["advantages"]) == pytest.approx(expected.tolist(), abs=1e-3)


def test_completions_table_shows_the_advantages_that_were_used(model_dir, tmp_path):
    trainer = train(model_dir, tmp_path, log_completions=True)
    for step, inputs in enumerate(trainer.inputs, start=1):
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert sorted(table["advantage"]) == pytest.approx(sorted(inputs["advantages"].tolist()))
        assert table["advantage"].min() == pytest.approx(-0.1)
        scored = table["distinct_letters"]
        expected = ((scored - scored.mean()) / (scored.std() + 1e-4)).clip(lower=-0.1)
        assert table["advantage"].tolist() == pytest.approx(expected.tolist(), abs=1e-4), "in the table's own order"


def test_iterable_dataset_trains_as_a_plain_one(model_dir, tmp_path):
    data = Dataset.from_dict({"prompt": PROMPTS})
    plain = train(model_dir, tmp_path, train_dataset=data, shuffle_dataset=False)
    streamed = train(model_dir, tmp_path, train_dataset=data.to_iterable_dataset(), shuffle_dataset=False)
    assert [e["loss"] for e in history(plain)] == [e["loss"] for e in history(streamed)]
    for (name, p), q in zip(plain.model.named_parameters(), streamed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_evaluation_has_its_own_generations_and_metrics(model_dir, tmp_path):
    trainer = make(
        model_dir,
        tmp_path,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        trainer_kwargs={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})},
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    metrics = trainer.evaluate()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))
    (inputs,) = trainer.inputs
    assert inputs["prompt_ids"].unique(dim=0).shape[0] == 2, "two completions of each prompt"
    logs = trainer.state.log_history[-1]
    assert metrics["eval_loss"] == pytest.approx(logs["eval_loss"])
    first, mean = weights_by_hand(inputs)
    assert logs["eval_trace/weight_first"] == pytest.approx(first, rel=1e-5)
    assert logs["eval_trace/weight_mean"] == pytest.approx(mean, rel=1e-5)
    assert {"eval_reward", "eval_rewards/unscored", "eval_approx_kl", "eval_clip_ratio/region_mean"} <= set(logs)
    assert not trainer._metrics["train"] and not trainer._sums["train"]


def test_truncated_completions_can_be_left_out(model_dir, tmp_path):
    trainer = train(model_dir, tmp_path, mask_truncated_completions=True, per_device_train_batch_size=8, max_steps=3)
    rows = torch.cat([inputs["completion_mask"].any(1) for inputs in trainer.inputs])
    assert 0 < rows.sum() < len(rows)
    for entry, inputs in zip(history(trainer), trainer.inputs, strict=True):
        kept = inputs["completion_mask"].any(1).float().mean().item()
        assert entry["completions/clipped_ratio"] == pytest.approx(1 - kept)
    assert_weights_are_those_of_trained_tokens(trainer)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.04, "num_iterations": 2}], ids=str)
@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(model_dir, tmp_path, settings):
    runs = [train(model_dir, tmp_path, gradient_checkpointing=value, **settings) for value in (True, False)]
    for on, off in zip(*map(history, runs), strict=True):
        assert on == pytest.approx(off, rel=1e-5, abs=1e-7)
    for (name, p), q in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_one(model_dir, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "beta": 0.04, "trace_style": "both"}
    whole = train(model_dir, tmp_path, **settings)
    resumed = make(model_dir, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(resumed.inputs) == 2
    assert history(resumed, "loss", "grad_norm", "reward") == history(whole, "loss", "grad_norm", "reward")
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


# --- Models


def lora():
    return pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


@pytest.mark.parametrize("beta", [0.0, 0.04], ids="beta={}".format)
def test_lora_trains_the_adapter_alone(model_dir, tmp_path, beta):
    trainer = train(model_dir, tmp_path, beta=beta, trainer_kwargs={"peft_config": lora()})
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)
    assert trainer.ref_model is None
    assert_weights_are_those_of_trained_tokens(trainer)
    assert all(0 < entry["trace/value_gap_bound_last"] < 1 for entry in history(trainer))


def test_qlora_trains_the_adapter_over_four_bits(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which is not installed")
    from transformers import BitsAndBytesConfig

    model_dir = str(tiny_model_dir(tmp_path, hidden=64))
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    trainer = make(
        model_dir, tmp_path / "out", trainer_kwargs={"peft_config": lora(), "quantization_config": four_bits}
    )
    parameters = dict(trainer.model.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    trainer.train()
    packed = [m for m in trainer.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 2 * 7 and all(m.weight.dtype == torch.uint8 for m in packed)
    for name, p in parameters.items():
        assert torch.equal(p, start[name]) != ("lora_" in name), name
    assert_weights_are_those_of_trained_tokens(trainer)


def test_mixture_of_experts_trains(moe_dir, tmp_path):
    trainer = train(moe_dir, tmp_path, per_device_train_batch_size=8)
    assert all(entry["aux_loss"] > 1 for entry in history(trainer))
    assert_weights_are_those_of_trained_tokens(trainer)


def test_vision_language_model_trains(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    processor, model = tiny_vision_language_model()
    images = [image_module.new("RGB", (8, 8), color) for color in ("red", "blue")]
    trainer = train(
        model,
        tmp_path,
        reward_funcs=lambda completions, **kwargs: distinct_letters([c[0]["content"] for c in completions]),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "What?"}]] * 2, "image": images}),
        trainer_kwargs={"processing_class": processor},
        still=["post_layernorm"],  # LLaVA does not use it
    )
    assert all(inputs["pixel_values"].shape == (4, 3, 8, 8) for inputs in trainer.inputs)
    assert_weights_are_those_of_trained_tokens(trainer)
    assert all(0 < entry["trace/value_gap_bound_last"] < 1 for entry in history(trainer))


# --- Tools and environments


def test_tokens_of_an_environment_are_no_time_steps(model_dir, tmp_path):
    def own_rollout(prompts, trainer):
        ids = [[70 + i, 71, 72, 73, 74, trainer.processing_class.eos_token_id] for i in range(len(prompts))]
        return {
            "prompt_ids": [[65, 66]] * len(prompts),
            "completion_ids": ids,
            "logprobs": [[-1.0] * 6] * len(prompts),
            "env_mask": [[1, 1, 0, 0, 0, 1]] * len(prompts),
        }

    trainer = train(
        model_dir,
        tmp_path,
        reward_funcs=lambda completion_ids, **kwargs: [float(ids[0]) for ids in completion_ids],
        trainer_kwargs={"rollout_func": own_rollout},
    )
    for entry in history(trainer):  # three trained tokens: 1 + a + a², 1 + a, 1
        assert entry["trace/weight_first"] == pytest.approx(1 + DECAY + DECAY**2, rel=1e-5)
        assert entry["trace/weight_mean"] == pytest.approx((3 + 2 * DECAY + DECAY**2) / 3, rel=1e-5)


def multiply(a: int, b: int) -> int:
    """
    Multiply two numbers.

    Args:
        a: One number.
        b: The other.

    Returns:
        Their product.
    """
    return a * b


class Counter:
    """An environment with a number, a tool that adds to it, and the reward."""

    def reset(self, **kwargs) -> str:
        self.number = 0
        return " Count."

    def add(self, amount: int) -> str:
        """
        Add to the number.

        Args:
            amount: How much.

        Returns:
            The number.
        """
        self.number += amount
        return str(self.number)

    def get_reward(self) -> float:
        return float(self.number)


def train_with_tools(tmp_path, call: dict, **trainer_kwargs):
    """Train on completions of which the first of each pair begins with a call, written for the model."""
    template = (importlib.resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    model_dir = str(tiny_model_dir(tmp_path, chat_template=template, max_position_embeddings=2048))
    trainer = make(
        model_dir,
        tmp_path / "out",
        max_steps=1,
        max_completion_length=160,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "Go."}]] * 2}),
        trainer_kwargs=trainer_kwargs,
        reward_funcs=trainer_kwargs.pop("reward_funcs", None),
    )
    tokenizer, generate = trainer.processing_class, trainer.model.generate
    text = f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>"

    def write(input_ids, **kwargs):
        if len(input_ids) < 4:  # after the tool has answered
            return generate(input_ids, **kwargs)
        answers = [text if row % 2 == 0 else "No.<|im_end|>" for row in range(len(input_ids))]
        ids = tokenizer(answers, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, ids], 1)

    with patch.object(trainer.model, "generate", write):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    (inputs,), (entry,) = trainer.inputs, history(trainer)
    assert (entry["tools/call_frequency"], entry["tools/failure_frequency"]) == (0.5, 0.0)
    tool_tokens = (inputs["completion_mask"] * (1 - inputs["tool_mask"])).sum(1)
    assert (tool_tokens > 0).sum() == 2, "the tool's answer is in two of four completions"
    assert_weights_are_those_of_trained_tokens(trainer)
    return trainer, inputs, entry


def test_tool_is_called_and_its_answer_is_no_time_step(tmp_path):
    trainer, inputs, _ = train_with_tools(
        tmp_path,
        {"name": "multiply", "arguments": {"a": 6, "b": 7}},
        tools=[multiply],
        reward_funcs=lambda completions, **kwargs: [float(any(m["role"] == "tool" for m in c)) for c in completions],
    )
    answers = [m["content"] for c in trainer._logs["completion"] for m in c if m["role"] == "tool"]
    assert answers == ["42", "42"]
    assert sorted(inputs["advantages"].tolist()) == pytest.approx([-0.1, -0.1, 0.866, 0.866], abs=1e-3)


def test_environment_gives_the_prompt_the_tools_and_the_reward(tmp_path):
    trainer, inputs, entry = train_with_tools(
        tmp_path, {"name": "add", "arguments": {"amount": 3}}, environment_factory=Counter
    )
    assert entry["rewards/Counter/mean"] == 1.5
    assert sorted(inputs["advantages"].tolist()) == pytest.approx([-0.1, -0.1, 0.866, 0.866], abs=1e-3)
    prompt = trainer.processing_class.decode(inputs["prompt_ids"][0])
    assert "Go. Count." in prompt and '"name": "add"' in prompt
