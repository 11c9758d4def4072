"""The critic's optimizer: its schedule, its rates, its precision, and what it does with a gradient that is none."""

from types import SimpleNamespace

import pytest
import sppo_runs
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import tiny_model, tiny_model_dir
from vapo_runs import BEST_AT_END, PROMPTS, BestFirst, make_trainer

from trl_credit.critics.engine.engine import _keep_in_float32
from trl_credit.critics.token import make_token_critic


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


def rates(trainer, since: int = 0) -> list[float]:
    log = trainer.state.log_history[since:]
    return [entry["critic/learning_rate"] for entry in log if "critic/learning_rate" in entry]


# --- The schedule

LINEAR = {"critic_lr_scheduler_type": "linear", "critic_learning_rate": 1e-3, "max_steps": 4}
FALLING = pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_an_evaluation_before_the_training_does_not_fix_the_schedule(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, per_device_eval_batch_size=4, **LINEAR)
    trainer.evaluate(eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}))
    trainer.train()
    assert rates(trainer) == FALLING


def test_a_second_training_has_a_schedule_of_its_own_as_the_policys(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=0, lr_scheduler_type="linear", **LINEAR)
    trainer.train()
    trainer.train()
    assert rates(trainer) == FALLING  # the second training begins a history of its own
    policy = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert policy == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


def test_a_pretraining_of_an_earlier_call_is_not_in_the_schedule(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=4, **LINEAR)
    trainer.pretrain_critic()
    trainer.train()
    assert rates(trainer) == FALLING


# --- A gradient that is not finite


def test_a_gradient_of_the_critic_that_is_not_finite_stops_the_run_and_blames_the_critic(model_dir, tmp_path):
    """A loss can be finite and its gradient not, as that of a square root at 0."""
    trainer = make_trainer(model_dir, tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    loss = trainer.critic_loss

    def broken(network, inputs):
        values = loss(network, inputs)
        return values if trainer.engine.steps < 2 else values + 0 * (values - values).sqrt()

    trainer.critic_loss = broken
    with pytest.raises(FloatingPointError, match=r"gradient norm of the critic is nan in its update 3, of a loss of"):
        trainer.train()
    assert trainer.engine.steps == trainer.state.global_step == 2
    saved = load_file(tmp_path / "checkpoint-2" / "critic" / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in trainer.critic.state_dict().items())
    assert all(p.isfinite().all() for p in trainer.critic.parameters())


# --- The optimizer


def test_the_head_has_a_rate_of_its_own(model_dir, tmp_path):
    settings = {"critic_learning_rate": 1e-5, "critic_head_learning_rate": 1e-3, "critic_weight_decay": 0.1}
    trainer = make_trainer(model_dir, tmp_path, critic_optim="adamw_torch", adam_epsilon=1e-30, **settings)
    before = {name: p.detach().clone() for name, p in trainer.critic.named_parameters()}
    trainer.train()
    moved = {name: (p - before[name]).abs().max().item() for name, p in trainer.critic.named_parameters()}
    assert moved["score.weight"] == pytest.approx(1e-3, rel=1e-2)  # AdamW's first step is the rate
    # The gradient of what is below a head of zeros is zero: only its decay moves it.
    assert max(value for name, value in moved.items() if "score" not in name) < 1e-5
    entry = next(entry for entry in trainer.state.log_history if "critic/learning_rate" in entry)
    assert (entry["critic/learning_rate"], entry["critic/head_learning_rate"]) == (1e-5, 1e-3)


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ((None, None), (1e-3, 1e-3)),
        ((1e-5, None), (1e-5, 1e-3)),
        ((2e-2, None), (2e-2, 2e-2)),
        ((0.0, None), (0.0, 0.0)),
        ((None, 1e-5), (1e-3, 1e-5)),
    ],
)
def test_the_heads_rate_is_by_default_not_below_the_others_and_0_where_that_is(given, rates, model_dir, tmp_path):
    settings = {"critic_learning_rate": given[0], "critic_head_learning_rate": given[1]}
    assert make_trainer(model_dir, tmp_path, **settings).critic_learning_rates() == rates


def test_default_rates_fall_with_the_width(tmp_path):
    folder = tiny_model_dir(tmp_path, hidden=256, layers=1)
    trainer = make_trainer(folder, tmp_path, critic_learning_rate=None)
    assert trainer.critic_learning_rates() == pytest.approx((0.1 / 256, 0.1 / 256))


def test_the_critics_optimizer_is_the_one_that_is_named(model_dir, tmp_path):
    schedule = {"critic_lr_scheduler_type": "cosine_with_min_lr", "critic_lr_scheduler_kwargs": {"min_lr_rate": 0.5}}
    trainer = make_trainer(model_dir, tmp_path, critic_optim="adafactor", max_steps=2, **schedule)
    trainer.train()
    assert type(trainer.engine.backend.optimizer).__name__ == "Adafactor"
    assert rates(trainer) == pytest.approx([1e-3, 0.75e-3])  # the middle of 1 and 0.5
    with pytest.raises(ValueError, match=r"`critic_optim` must be one of \('adamw_torch', .*, got 'adam'"):
        make_trainer(model_dir, tmp_path, critic_optim="adam")
    with pytest.raises(ValueError, match=r"`critic_optim_args='a=1'` has no effect on `critic_optim='adafactor'`"):
        make_trainer(model_dir, tmp_path, critic_optim="adafactor", critic_optim_args="a=1")


# --- Where a fresh head starts


def half(completion_ids, **kwargs):
    """Rewards with a mean of 0.5, and one completion that is not scored."""
    return [None, *[0.25, 0.5, 0.75][: len(completion_ids) - 1]]


def test_a_fresh_head_starts_at_the_mean_reward_of_the_first_rollout(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, reward=half, critic_learning_rate=0.0)
    trainer.train()
    first = trainer.rollouts_seen[0]
    assert first["values"][first["critic_mask"]].unique().tolist() == [0.5]


def test_an_evaluation_does_not_start_the_head(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, reward=half, critic_learning_rate=0.0, per_device_eval_batch_size=4)
    trainer.evaluate(eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}))
    assert trainer.rollouts_seen[0]["values"].abs().max() == 0
    trainer.train()
    assert trainer.rollouts_seen[1]["values"].max() == 0.5


def test_the_head_starts_once_also_in_a_run_that_resumes(model_dir, tmp_path):
    settings = {"critic_learning_rate": 0.0, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(model_dir, tmp_path, reward=half, **{**settings, "max_steps": 1}).train()
    resumed = make_trainer(model_dir, tmp_path, reward=lambda completions, **_: [1.0] * len(completions), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.rollouts_seen[0]["values"].max() == 0.5


@pytest.mark.parametrize("kind", ["lora", "shared"])
def test_the_head_of_a_critic_with_adapters_starts_there_too(kind, model_dir, tmp_path):
    lora = {"r": 2, "target_modules": "all-linear"}
    settings = {"critic_peft_config": lora, "critic_learning_rate": 0.0}
    if kind == "shared":
        settings |= {"critic_share_base": True, "peft_config": LoraConfig(**lora)}
    trainer = make_trainer(model_dir, tmp_path, reward=half, **settings)
    trainer.train()
    assert trainer.rollouts_seen[0]["values"].max() == 0.5
    trainer.save_critic(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert [weight.item() for name, weight in saved.items() if name.endswith("score.bias")] == [0.5]


def test_a_head_that_comes_with_the_critic_is_left_alone_and_a_number_for_it_refused(model_dir, tmp_path):
    network = make_token_critic(model_dir)
    with torch.no_grad():
        network.score.bias.fill_(0.125)
    trainer = make_trainer(model_dir, tmp_path, reward=half, critic=network, critic_learning_rate=0.0)
    trainer.train()
    assert trainer.rollouts_seen[0]["values"].max() == 0.125
    with pytest.raises(ValueError, match="has learned already, which cannot start at `critic_initial_value`"):
        make_trainer(model_dir, tmp_path, critic=network, critic_initial_value=0.5)
    with pytest.raises(ValueError, match=r"`critic_initial_value=0.0` has no effect: the critic comes with a head"):
        make_trainer(model_dir, tmp_path, critic=network, critic_initial_value=0.0)


@pytest.mark.parametrize(
    ("settings", "rewards", "value"),
    [
        ({}, half, 0.5),
        ({"reward_range": [0, 2]}, half, 0.5),
        ({"critic_loss": "mse"}, half, 0.5),
        ({}, lambda completions, **_: [1.0] * len(completions), 0.95),  # a logit of 1 is infinite
    ],
)
def test_a_critic_of_prompts_starts_there_in_units_of_the_reward(settings, rewards, value, model_dir, tmp_path):
    trainer = sppo_runs.make_trainer(model_dir, tmp_path, reward=rewards, critic_learning_rate=0.0, **settings)
    trainer.train()
    assert trainer.rollouts_seen[0]["values"].tolist() == pytest.approx([value] * 4)


# --- Precision


@pytest.mark.parametrize("source", ["own", "policys"])
@pytest.mark.slow
def test_a_critic_in_bfloat16_moves_the_weights_that_one_in_float32_moves(source, model_dir, tmp_path):
    def moved(dtype):
        settings = {"critic_learning_rate": 1e-5, "critic_head_learning_rate": 1e-2, "max_steps": 5, "seed": 1}
        settings[f"{'critic_' if source == 'own' else ''}model_init_kwargs"] = {"dtype": dtype}
        trainer = make_trainer(model_dir, tmp_path, reward=half, **settings)
        assert trainer.critic.model.layers[0].mlp.up_proj.weight.dtype == getattr(torch, dtype)
        before = {name: p.detach().float().clone() for name, p in trainer.critic.named_parameters()}
        trainer.train()
        return sum((p != before[name]).sum().item() for name, p in trainer.critic.named_parameters())

    bfloat16, float32 = moved("bfloat16"), moved("float32")
    assert bfloat16 > 0.98 * float32 > 3000


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({}, 0),
        ({"critic_model_init_kwargs": {"dtype": "float32"}}, 0),
        ({"critic_model_init_kwargs": {"dtype": "bfloat16"}}, 1),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, 1),  # inherited
        ({"model_init_kwargs": {"dtype": "bfloat16"}, "critic_model_init_kwargs": {"dtype": "float32"}}, 0),
    ],
)
def test_who_asks_for_less_than_float32_is_told_once_what_is_kept(settings, times, model_dir, tmp_path, caplog):
    make_trainer(model_dir, tmp_path, max_steps=2, **settings).train()
    assert caplog.text.count("The critic was loaded in torch.bfloat16. The weights of it that are trained are") == times


@pytest.mark.parametrize(("section", "times"), [({}, 0), ({"bf16_master_weights_and_grads": True}, 1)])
def test_deepspeed_without_copies_in_float32_is_warned_of_by_name(section, times, caplog):
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    pytest.importorskip("deepspeed")
    config = {"bf16": {"enabled": True, **section}, "zero_optimization": {"stage": 2}}
    state = SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    kind = {"distributed_type": DistributedType.DEEPSPEED, "mixed_precision": "bf16"}
    PartialState()  # for the logger
    network = tiny_model().bfloat16()
    assert _keep_in_float32(network, SimpleNamespace(state=state, **kind)) is None
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}, "as DeepSpeed takes it"
    assert caplog.text.count("`bf16_master_weights_and_grads` in the DeepSpeed config leaves no copy") == times


def test_a_critic_in_bfloat16_is_saved_as_it_is_trained_and_resumes_to_the_bit(model_dir, tmp_path):
    settings = {"critic_model_init_kwargs": {"dtype": "bfloat16"}, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(model_dir, tmp_path / "a", max_steps=3, **settings)
    whole.train()
    resumed = make_trainer(model_dir, tmp_path / "b", max_steps=3, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert whole.critic.score.weight.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(whole.critic.parameters(), resumed.critic.parameters(), strict=True))


# --- The best model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.slow
def test_the_best_policy_is_loaded_with_the_critic_of_its_step(lora, model_dir, tmp_path):
    settings = {"critic_peft_config": {"r": 2, "target_modules": "all-linear"}} if lora else {}
    trainer = make_trainer(model_dir, tmp_path, trainer=BestFirst, **BEST_AT_END, **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    trainer.save_critic(tmp_path / "end")
    name = f"{'adapter_' * lora}model.safetensors"
    end, first, last = (load_file(tmp_path / f / name) for f in ("end", "checkpoint-1/critic", "checkpoint-3/critic"))
    assert all(torch.equal(end[key], first[key]) for key in end)
    assert any(not torch.equal(end[key], last[key]) for key in end)
