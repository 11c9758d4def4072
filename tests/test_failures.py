"""
What has gone wrong with critics elsewhere, each test named for what must not happen again. The numbers are those of
the table in `docs/failures.md`, which says where its other rows are tested.
"""

import copy
import math

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForTokenClassification
from vapo_runs import LENGTH, make_trainer, share_of_even

from trl_credit import gae, length_adaptive_lambda
from trl_credit.critics.token import make_token_critic, read_values


def noisy_critic(seed=1):
    network = make_token_critic(tiny_model(seed=seed))
    with torch.no_grad():
        network.score.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return network


def completions(*lengths, eos=True):
    """A rollout of completions of these lengths; with `eos` the last token of each is EOS if there is room for it."""

    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        ids = [[65 + i for i in range(length)] for length in lengths]
        if eos:
            ids = [[*row[:-1], tokenizer.eos_token_id] if len(row) < LENGTH else row for row in ids]
        return {
            "prompt_ids": tokenizer(list(prompts))["input_ids"],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(row) for row in ids],
        }

    return rollout


def one_rollout(trainer):
    trainer.train()
    return trainer.rollouts_seen[0]


def ones(completions, **kwargs):
    return [1.0] * len(completions)


# --- 1 to 5: which token


@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["pad apart", "pad is eos"])
def test_1_2_reward_lands_on_eos_and_not_on_padding_or_the_token_before(
    pad_is_eos, model_dir, pad_is_eos_dir, tmp_path
):
    # λ = 0 and V = 0: the advantage is the reward, where it falls.
    trainer = make_trainer(
        pad_is_eos_dir if pad_is_eos else model_dir,
        tmp_path,
        ones,
        completions(3, 5, 12, 1),
        policy_lambda=0.0,
        critic_initial_value=0.0,
    )
    advantages = one_rollout(trainer)["advantages"]
    assert [row.nonzero().flatten().tolist() for row in advantages] == [[2], [4], [11], [0]]
    assert advantages.sum(1).tolist() == [1.0] * 4


def test_2_a_real_eos_is_trained_on_when_pad_is_eos(pad_is_eos_dir, tmp_path):
    trainer = make_trainer(pad_is_eos_dir, tmp_path, ones, completions(3, 5, 12, 1))
    rollout = one_rollout(trainer)
    assert rollout["critic_mask"].sum(1).tolist() == [3, 5, 12, 1]
    assert rollout["returns"].sum(1).tolist() == [3, 5, 12, 1]


def test_3_padding_after_a_truncated_completion_is_not_valid(model_dir, tmp_path):
    # No EOS anywhere, and the shorter ones are padded.
    trainer = make_trainer(model_dir, tmp_path, ones, completions(3, 5, 12, 1, eos=False), truncation="bootstrap")
    rollout = one_rollout(trainer)
    assert rollout["critic_mask"].sum(1).tolist() == [3, 5, 12, 1]
    assert rollout["advantages"][0, 3:].abs().sum() == 0


def test_3_truncated_completions_go_on_with_the_critics_value_when_asked(model_dir, tmp_path):
    settings = {"critic": noisy_critic(), "policy_lambda": 0.0, "critic_lambda": 0.0, "truncation": "bootstrap"}
    rewards = lambda completions, **kwargs: [0.0] * len(completions)  # noqa: E731
    trainer = make_trainer(model_dir, tmp_path, rewards, completions(12, 5, 12, 1, eos=False), **settings)
    network = copy.deepcopy(trainer.critic)
    rollout = one_rollout(trainer)
    states = read_values(network, rollout)
    lengths = torch.tensor([12, 5, 12, 1]).unsqueeze(1)
    after = states.gather(1, lengths)
    assert after.abs().min() > 1e-3
    # The shorter ones had room left: they ended by themselves.
    torch.testing.assert_close(rollout["returns"].gather(1, lengths - 1), torch.where(lengths == 12, after, 0))


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_4_no_value_at_or_after_eos_reaches_an_advantage(truncation, model_dir, tmp_path):
    settings = {"critic": noisy_critic(), "policy_lambda": 0.5, "truncation": truncation}
    trainer = make_trainer(model_dir, tmp_path, ones, completions(3, 5, 11, 2), **settings)
    rollout = one_rollout(trainer)
    last = rollout["critic_mask"].sum(1, keepdim=True) - 1
    # The advantage of EOS itself is the reward less its own value, and no other.
    expected = 1 - rollout["values"].gather(1, last)
    torch.testing.assert_close(rollout["advantages"].gather(1, last), expected)


def test_4_the_value_of_a_token_is_that_of_the_state_before_it(model_dir):
    critic = noisy_critic()
    inputs = {
        "prompt_ids": torch.tensor([[70, 71, 72]]),
        "prompt_mask": torch.ones(1, 3, dtype=torch.long),
        "completion_ids": torch.tensor([[80, 81, 82]]),
        "completion_mask": torch.ones(1, 3, dtype=torch.long),
    }
    values = read_values(critic, inputs)
    changed = {**inputs, "completion_ids": torch.tensor([[80, 99, 82]])}
    different = (read_values(critic, changed) != values)[0].tolist()
    # Token 1 is no part of the state in which it, or token 0, is chosen.
    assert different == [False, False, True, True]


def test_5_tool_tokens_are_no_actions_and_the_reward_survives_them():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0]])  # the last one masked too
    advantages, returns = gae(torch.tensor([1.0]), torch.full((1, 6), 0.25), mask, 0.5, 0.5)
    # Three steps, as if the tool were not there: R_2 = 1, R_1 = .5(.5·.25 + .5·1), R_0 = .5(.5·.25 + .5·.3125)
    assert returns.tolist() == [[0.140625, 0.3125, 0, 0, 1, 0]]
    assert advantages.tolist() == [[-0.109375, 0.0625, 0, 0, 0.75, 0]]


# --- 6 to 9: what is divided by what


def gradient_norms(model_dir, folder, **settings):
    # No clip, so that norms are those of the gradients.
    trainer = make_trainer(model_dir, folder, critic=noisy_critic(), max_grad_norm=0.0, **settings)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, [(entry["grad_norm"], entry["critic/grad_norm"], entry["critic/loss"]) for entry in log]


@pytest.mark.parametrize("reward", [share_of_even, ones], ids=["mixed", "all positive"])
def test_6_7_losses_do_not_depend_on_the_number_of_micro_batches(reward, model_dir, tmp_path):
    settings = {"reward": reward, "length_adaptive_alpha": 1.5, "positive_lm_coef": 0.5}
    whole, norms = gradient_norms(model_dir, tmp_path / "a", per_device_train_batch_size=8, **settings)
    split, others = gradient_norms(
        model_dir, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings
    )
    assert norms[0] == pytest.approx(others[0], rel=1e-5)
    for one, other in ((whole.model, split.model), (whole.critic, split.critic)):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_6_each_of_several_steps_on_a_rollout_is_one_mean_over_its_own_tokens(model_dir, tmp_path):
    """TRL alone shares the tokens of a rollout out evenly over its steps."""
    trainer = make_trainer(model_dir, tmp_path, steps_per_generation=2, max_steps=2)
    seen = []
    begin = type(trainer).begin_step

    class Counting(type(trainer)):
        def begin_step(self, micro_batches, mode):
            begin(self, micro_batches, mode)
            tokens = sum((part["completion_mask"] * part["tool_mask"]).sum().item() for part in micro_batches)
            seen.append((tokens, [part["num_items_in_batch"].item() / 2 for part in micro_batches]))

    trainer.__class__ = Counting
    trainer.train()
    assert len(seen) == 2 and seen[0][0] != seen[1][0]
    for tokens, divisors in seen:
        assert divisors == [tokens]


def test_8_the_positive_lm_loss_pulls_on_right_completions_and_on_no_others(model_dir, tmp_path):
    def norm(reward, coef):
        # A critic that knows the reward everywhere leaves no advantage.
        critic = make_token_critic(tiny_model(seed=1), initial_value=reward([[65]])[0])
        rewards = lambda completions, **kwargs: reward(completions)  # noqa: E731
        trainer = make_trainer(
            model_dir, tmp_path, rewards, critic=critic, positive_lm_coef=coef, positive_reward_threshold=0.5
        )
        trainer.train()
        entry = [entry for entry in trainer.state.log_history if "loss" in entry][0]
        return entry["grad_norm"], entry.get("positive_lm/share")

    assert norm(lambda rows: [1.0] * len(rows), 0.0) == (pytest.approx(0, abs=1e-6), None)
    pulled, share = norm(lambda rows: [1.0] * len(rows), 0.1)
    assert pulled > 0.05 and share == 1
    assert norm(lambda rows: [0.5] * len(rows), 0.1) == (pytest.approx(0, abs=1e-6), 0)


def test_9_masked_truncated_completions_are_in_no_numerator_and_no_denominator(model_dir, tmp_path):
    settings = {"mask_truncated_completions": True, "length_adaptive_alpha": 1.5, "reward": share_of_even}
    long, norms = gradient_norms(model_dir, tmp_path / "a", rollout=completions(3, 5, 12, 4), **settings)
    # The same without the one that was cut off; its row is empty.
    assert long.rollouts_seen[0]["critic_mask"].sum(1).tolist() == [3, 5, 0, 4]
    assert long.rollouts_seen[0]["advantages"][2].abs().sum() == 0

    def three(prompts, trainer):
        rollout = completions(3, 5, 12, 4)(prompts, trainer)
        rollout["completion_ids"][2] = [90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 64, 63]  # other tokens, as cut off
        return rollout

    _, others = gradient_norms(model_dir, tmp_path / "b", rollout=three, **settings)
    assert norms[0] == pytest.approx(others[0], rel=1e-6)


# --- 10 to 15: the network


def test_10_values_are_float32_where_the_backbone_is_bf16():
    critic = make_token_critic(tiny_model(), model_init_kwargs=None)
    critic.model.bfloat16()
    with torch.no_grad():
        critic.score.weight.fill_(1e-3)
        critic.score.bias.fill_(100.0)
        states = critic.model(torch.tensor([[70, 80]])).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            values = critic(torch.tensor([[70, 80]])).logits[..., 0]
    assert states.dtype == torch.bfloat16 and values.dtype == torch.float32
    # bf16 has no number between 100 and 100.5.
    torch.testing.assert_close(values, 100 + 1e-3 * states.float().sum(-1), rtol=0, atol=1e-4)
    assert (values != values.bfloat16().float()).any()


def test_10_a_fresh_critic_explains_nothing_instead_of_minus_72(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path)
    rollout = one_rollout(trainer)
    mean = trainer.state.log_history[0]["reward"]  # of the first rollout, where a fresh head starts
    values = rollout["values"][rollout["critic_mask"]]
    torch.testing.assert_close(values, torch.full_like(values, mean))
    assert trainer.state.log_history[0]["critic/explained_variance"] == 0


def test_11_values_are_the_same_each_time_in_training_mode():
    policy = tiny_model(attention_dropout=0.5)
    policy.config.classifier_dropout = 0.5
    critic = make_token_critic(policy).train()
    with torch.no_grad():
        critic.score.weight.normal_()
    ids = torch.randint(5, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(critic(ids).logits, critic(ids).logits)


def test_11_dropout_in_the_critics_adapters_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="lora_dropout=0.1.*Set it to 0"):
        make_trainer(model_dir, tmp_path, critic_peft_config={"r": 4, "lora_dropout": 0.1})


def test_13_the_policy_is_saved_without_the_critic_in_it(model_dir, tmp_path):
    from safetensors.torch import load_file

    trainer = make_trainer(model_dir, tmp_path)
    trainer.train()
    trainer.save_model()
    saved, base = load_file(tmp_path / "model.safetensors"), load_file(f"{model_dir}/model.safetensors")
    assert saved.keys() == base.keys()
    assert not any("score" in name for name in dict(trainer.model.named_parameters()))  # what vLLM is sent
    assert "score.weight" in load_file(tmp_path / "critic" / "model.safetensors")


def test_15_a_lora_critic_is_saved_with_its_head(model_dir, tmp_path):
    config = {"r": 4, "target_modules": "all-linear"}
    trainer = make_trainer(model_dir, tmp_path, critic_peft_config=config, critic_learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    inputs = trainer.rollouts_seen[0]
    values = read_values(trainer.critic, inputs)
    assert values.abs().max() > 1e-3
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic", num_labels=1)
    torch.testing.assert_close(read_values(plain, inputs), values, rtol=0, atol=1e-6)
    again = make_token_critic(tmp_path / "critic")
    torch.testing.assert_close(read_values(again, inputs), values, rtol=0, atol=1e-6)


def test_the_head_of_a_reward_model_is_kept(model_dir, tmp_path):
    from transformers import AutoModelForSequenceClassification

    reward_model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
    reward_model.save_pretrained(tmp_path / "rm")
    for source in (tmp_path / "rm", reward_model):
        critic = make_token_critic(source)
        assert torch.equal(critic.score.weight, reward_model.score.weight)
        assert critic.score.bias.item() == 0


# --- 17, 18: the beginning


@pytest.mark.parametrize("steps", [1, 3])
def test_17_18_the_critic_gets_all_its_pretraining_steps_before_the_policy_moves(steps, model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=steps, critic_learning_rate=1e-2, max_steps=2)
    before = copy.deepcopy(trainer.model.state_dict())
    moments = []
    update = type(trainer).update_critic

    class Looking(type(trainer)):
        def update_critic(self, micro_batches, *args):
            moved = any(not torch.equal(before[name], p) for name, p in self.model.state_dict().items())
            result = update(self, micro_batches, *args)
            moments.append((self.state.global_step, moved, self.engine.steps))
            return result

    trainer.__class__ = Looking
    trainer.train()
    pretraining = [(0, False, step + 1) for step in range(steps)]
    # Each later update comes with a policy step of its own.
    assert moments == [*pretraining, (1, True, steps + 1), (2, True, steps + 2)]


# --- 19 to 22: what is computed of the values


def test_19_explained_variance_is_of_monte_carlo_returns_and_of_all_tokens(model_dir, tmp_path):
    settings = {"critic": noisy_critic(), "critic_lambda": 0.0, "gamma": 0.9, "per_device_train_batch_size": 2}
    trainer = make_trainer(model_dir, tmp_path, gradient_accumulation_steps=4, **settings)
    rollout = one_rollout(trainer)
    mask, rewards = rollout["critic_mask"], trainer.rewards_seen[0]
    remaining = mask.sum(1, keepdim=True) - mask.cumsum(1)
    returns = rewards.unsqueeze(1) * 0.9**remaining
    r, v = returns[mask], rollout["values"][mask]
    expected = 1 - ((r - v).var() / r.var()).item()
    assert trainer.state.log_history[0]["critic/explained_variance"] == pytest.approx(expected, rel=1e-4)
    # Against its own targets a critic with λ = 0 looks far better or worse than it is.
    targets = rollout["returns"][mask]
    assert abs(1 - ((targets - v).var() / targets.var()).item() - expected) > 0.1


def test_20_the_value_clip_compares_with_the_rollouts_values(model_dir, tmp_path):
    settings = {"critic": noisy_critic(), "critic_learning_rate": 0.1, "num_iterations": 3, "max_steps": 3}
    log = [
        [entry for entry in make_and_train(model_dir, tmp_path, clip, settings) if "loss" in entry]
        for clip in (None, 0.01)
    ]
    # Nothing has moved in the first update; after it, values outside the range are held back.
    assert log[1][0]["critic/clipped_values"] == 0
    assert log[1][1]["critic/clipped_values"] > 0.5
    assert log[1][0]["critic/loss"] == log[0][0]["critic/loss"]
    assert log[1][2]["critic/grad_norm"] < log[0][2]["critic/grad_norm"]


def make_and_train(model_dir, folder, clip, settings):
    settings = {**settings, "critic": copy.deepcopy(settings["critic"])}
    trainer = make_trainer(model_dir, folder, critic_clip_range=clip, **settings)
    trainer.train()
    return trainer.state.log_history


def test_21_whitening_touches_advantages_and_not_returns(model_dir, tmp_path):
    plain, white = (
        one_rollout(make_trainer(model_dir, tmp_path, critic=noisy_critic(), whiten_advantages=on))
        for on in (False, True)
    )
    assert torch.equal(plain["returns"], white["returns"])
    kept = white["advantages"][white["critic_mask"]]
    assert kept.mean().abs() < 1e-6 and kept.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_22_length_adaptive_lambda_reaches_the_advantages_where_it_is_not_clamped(model_dir, tmp_path):
    trainer = make_trainer(
        model_dir, tmp_path, ones, completions(3, 5, 12, 8), length_adaptive_alpha=0.5, critic_initial_value=0.0
    )
    rollout = one_rollout(trainer)
    # V = 0 and one reward at the end: the advantage of token t is λ^(l-1-t), λ = 1 - 2/l.
    for row, length in enumerate((3, 5, 12, 8)):
        expected = torch.tensor([(1 - 2 / length) ** (length - 1 - t) for t in range(length)])
        torch.testing.assert_close(rollout["advantages"][row, :length], expected)
    assert length_adaptive_lambda(torch.tensor([3]), 0.5).item() == pytest.approx(1 / 3)


# --- 25, and numbers that are none


def test_25_a_completion_without_a_reward_is_left_out_of_both_losses_and_poisons_nothing(model_dir, tmp_path):
    def some(completions, **kwargs):
        return [None if i == 1 else 1.0 for i in range(len(completions))]

    trainer = make_trainer(model_dir, tmp_path, some, completions(3, 5, 12, 4))
    rollout = one_rollout(trainer)
    assert rollout["critic_mask"].sum(1).tolist() == [3, 0, 12, 4]
    assert rollout["advantages"][1].abs().sum() == 0 and rollout["advantages"].isfinite().all()
    assert all(p.isfinite().all() for p in (*trainer.model.parameters(), *trainer.critic.parameters()))
    assert math.isfinite(trainer.state.log_history[0]["critic/loss"])


def test_25_a_batch_without_any_reward_moves_neither_network(model_dir, tmp_path):
    def none(completions, **kwargs):
        return [None] * len(completions)

    trainer = make_trainer(model_dir, tmp_path, none, critic=noisy_critic())
    before = [copy.deepcopy(network.state_dict()) for network in (trainer.model, trainer.critic)]
    trainer.train()
    for network, weights in zip((trainer.model, trainer.critic), before, strict=True):
        assert all(torch.equal(weights[name], p) for name, p in network.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run_with_the_critic_as_it_was(model_dir, tmp_path):
    critic = noisy_critic()
    trainer = make_trainer(model_dir, tmp_path, critic=critic)
    trainer.train()
    weights = copy.deepcopy(trainer.critic.state_dict())
    broken = {**trainer.rollouts_seen[0]}
    broken["returns"] = torch.full_like(broken["returns"], torch.inf)
    with pytest.raises(FloatingPointError, match="critic's loss is inf in its update 2"):
        trainer.update_critic([broken])
    assert all(torch.equal(weights[name], p) for name, p in trainer.critic.state_dict().items())
