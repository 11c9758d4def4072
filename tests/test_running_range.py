"""A range of the reward that is learnt: rewards as people have them."""

import json
import math
import re

import genac_runs
import pytest
import sppo_runs
import torch
import vapo_runs
from tiny import tiny_model, tiny_tokenizer

from trl_credit import VAPOConfig
from trl_credit.critics.generative.question import TEMPLATE, TEMPLATE_OF_REWARDS, Question, check_template
from trl_credit.critics.loading import load_critic
from trl_credit.critics.token import make_token_critic
from trl_credit.trainers.critic.reward_range import RewardRange


def from_minus_2_to_2(completion_ids, **kwargs):
    """As environments give them."""
    return [(-2.0, 2.0, -0.5, 1.0)[row % 4] for row in range(len(completion_ids))]


def right(completion_ids, **kwargs):
    return [float(len(ids) % 2) for ids in completion_ids]


def worse_each_time():
    """Rewards of 0 and 1 in the first rollout, of -1 and 0 in the second, of -2 and -1 in the third."""
    calls = []

    def reward(completion_ids, **kwargs):
        calls.append(None)
        return [score + 1 - len(calls) for score in right(completion_ids)]

    return reward


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- The range


def test_a_range_grows_to_what_it_does_not_hold_and_never_shrinks():
    running = RewardRange.of("running", None)
    assert list(running) == [0, 1] and not running.grow_to(0.2, 1 + 1e-6), "a sum of weights that is off by rounding"
    assert running.grow_to(-2, 0.5) and list(running) == [-2, 1]
    assert running.grow_to(0, 3) and list(running) == [-2, 3]
    assert list(RewardRange.of("running", [0.2, 0.8])) == [0.2, 0.8], "that of the critic that a run starts from"
    given = RewardRange.of([0, 1], None)
    assert not given.grow_to(-2, 2) and list(given) == [0, 1] and RewardRange.of(None, [0, 1]) is None


# --- Critics with a head


@pytest.mark.parametrize("method", ["sppo", "vapo"])
def test_the_range_is_learnt_logged_and_saved(method, model_dir, tmp_path):
    runs = {"sppo": sppo_runs, "vapo": vapo_runs}[method]
    settings = {"reward_range": "running", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = runs.make_trainer(model_dir, tmp_path, worse_each_time(), **settings)
    trainer.train()
    assert logged(trainer, "critic/lowest_reward") == [0, -1] and logged(trainer, "critic/highest_reward") == [1, 1]
    for step, ends in ((1, [0, 1]), (2, [-1, 1])):
        facts = json.loads((tmp_path / f"checkpoint-{step}" / "critic" / "critic.json").read_text())
        assert facts["settings"]["reward_range"] == ends
    rollout = trainer.rollouts_seen[-1]
    loaded = load_critic(str(tmp_path / "checkpoint-2" / "critic"), trainer.processing_class, dtype="float32")
    ours = trainer.state_values(rollout)
    assert list(loaded.reward_range) == [-1, 1]
    torch.testing.assert_close(loaded.state_values(trainer.with_prompts(rollout)), ours, equal_nan=True)


@pytest.mark.parametrize("method", ["sppo", "vapo"])
def test_a_resumed_run_goes_on_with_its_range(method, model_dir, tmp_path):
    runs = {"sppo": sppo_runs, "vapo": vapo_runs}[method]
    settings = {"reward_range": "running", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = runs.make_trainer(model_dir, tmp_path, from_minus_2_to_2, **settings)
    whole.train()
    resumed = runs.make_trainer(model_dir, tmp_path, from_minus_2_to_2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert list(resumed.value_range) == list(whole.value_range) != [0, 1]
    assert torch.equal(resumed.rollouts_seen[-1]["values"], whole.rollouts_seen[-1]["values"])
    other = runs.make_trainer(model_dir, tmp_path, from_minus_2_to_2, **{**settings, "reward_range": [-2, 3]})
    with pytest.raises(ValueError, match=r"was saved by a run with `reward_range=\[-2.0, 2.0\]`"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_later_run_begins_with_the_range_of_its_critic(model_dir, tmp_path):
    first = sppo_runs.make_trainer(model_dir, tmp_path, from_minus_2_to_2)
    first.train()
    first.save_model()
    later = sppo_runs.make_trainer(model_dir, tmp_path / "later", critic=str(tmp_path / "critic"))
    assert list(later.value_range) == [-2, 2] and later.args.reward_range == "running"


def odds(value, low, high):
    return (value - low) / (high - value)


def test_a_wider_range_leaves_the_mean_value_where_it_was(model_dir, tmp_path):
    """Values are those of the head with its bias moved, as loops in float64 say."""
    critic = make_token_critic(tiny_model(seed=1))
    with torch.no_grad():
        critic.score.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    settings = {"critic": critic, "reward_range": "running", "critic_learning_rate": 0.0, "policy_lambda": 1.0}
    trainer = vapo_runs.make_trainer(model_dir, tmp_path, from_minus_2_to_2, **settings)
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    with torch.no_grad():
        outputs = trainer.critic(
            input_ids=torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1),
            attention_mask=torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1),
            position_ids=(torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1).cumsum(1) - 1).clamp(
                min=0
            ),
        ).logits[:, rollout["prompt_ids"].shape[1] - 1 : -1, 0]
    by = critic.score.bias.item()
    before = [1 / (1 + math.exp(-(output - by))) for output in outputs[:, 0].tolist()]
    mean = sum(before) / len(before)
    assert by == pytest.approx(math.log(odds(mean, -2, 2)) - math.log(odds(mean, 0, 1)), rel=1e-4)
    assert abs(by) > 0.1
    for row, column in rollout["critic_mask"].nonzero().tolist():
        value = -2 + 4 / (1 + math.exp(-outputs[row, column].item()))
        assert rollout["values"][row, column].item() == pytest.approx(value, abs=1e-5)
    after = rollout["values"][:, 0].mean().item()
    assert abs(after - mean) < 0.02 < abs(-2 + 4 * mean - mean), "what the same logits would have said"


def test_what_is_still_to_come_at_a_token_counts(model_dir, tmp_path):
    def up_and_down(completion_ids, **kwargs):
        return [[1.0] * (len(ids) > 1) + [0.0] * (len(ids) - 2) + [-1.0] for ids in completion_ids]

    trainer = vapo_runs.make_trainer(model_dir, tmp_path, up_and_down, None, reward_range="running")
    trainer.train()
    assert set(trainer.rewards_seen[0].tolist()) <= {0.0, -1.0} and list(trainer.value_range) == [-1, 1]


def test_an_evaluation_changes_no_range(model_dir, tmp_path):
    trainer = sppo_runs.make_trainer(
        model_dir, tmp_path, from_minus_2_to_2, eval_dataset=vapo_runs.Dataset.from_dict({"prompt": vapo_runs.PROMPTS})
    )
    trainer.evaluate()
    assert list(trainer.value_range) == [0, 1]


def test_a_learnt_range_is_not_for_a_probe_critic_which_keeps_returns(model_dir, tmp_path):
    settings = {"critic_learning_rate": None, "beta": 0.1, "reward_range": "running"}
    with pytest.raises(ValueError, match="`reward_range='running'` cannot be had with a probe critic"):
        vapo_runs.make_trainer(model_dir, tmp_path, critic="probe", **settings)


@pytest.mark.parametrize(
    ("given", "meant"), [(["running"], "running"), (["-1", "2.5"], [-1, 2.5]), ((0, 2), [0, 2]), ("running", "running")]
)
def test_a_range_may_be_given_as_a_parser_gives_it(given, meant, tmp_path):
    assert VAPOConfig(str(tmp_path), reward_range=given, use_cpu=True, bf16=False).reward_range == meant


# --- A critic that writes its values


def test_the_question_says_what_the_scores_mean_and_answers_are_on_that_scale():
    check_template(TEMPLATE_OF_REWARDS, ("actor", "success_rate", "lowest_reward", "highest_reward", "problem"))
    tokenizer = tiny_tokenizer()
    running = RewardRange.of("running", None)
    question = Question(tokenizer, tokenizer, TEMPLATE, "Somebody", reward_range=running)
    assert question.wording == TEMPLATE and question.value("<score>7</score>") == 0.7
    running.grow_to(-2, 1.6)
    (prompt,) = question.about([70, 71], "1 + 1?", -0.25).query.prompts()
    text = tokenizer.decode(prompt)
    assert "a number from -2 to 1.6" in text and "0 (certain to get -2) to 10 (certain to get 1.6)" in text
    assert "its reward has lately been -0.25 on average" in text and "{" not in text
    assert question.value("<score>10</score>") == pytest.approx(1.6) and question.value("<score>0</score>") == -2
    assert question.value("<score>5</score>") == pytest.approx(-0.2) and question.value("none") is None
    own = Question(tokenizer, tokenizer, "{problem} {partial_solution} =", reward_range=running)
    assert own.wording == own.template


@pytest.mark.parametrize("ends", ["running", [-2, 2]], ids=["learnt", "given"])
def test_values_and_advantages_of_genac_are_in_units_of_the_reward(ends, model_dir, tmp_path):
    critic = genac_runs.fit_critic(tmp_path / "critic", unparsed=0)
    settings = {"critic": critic, "reward_range": ends, "critic_baseline": "none", "log_completions": True}
    trainer = genac_runs.make_trainer(model_dir, tmp_path, from_minus_2_to_2, **settings)
    trainer.train()
    (rewards,), (rollout,) = trainer.rewards_seen, trainer.rollouts_seen
    assert list(trainer.reward_range) == [-2, 2] == list(trainer.critic_reader.question.reward_range)
    squares, compared = [], 0
    for reward, reading, advantages in zip(rewards.tolist(), rollout["readings"], rollout["advantages"], strict=True):
        texts = trainer.critic_reader.text_of(reading.answers)
        scores = [re.findall(r"<score>(\d+)</score>", text) for text in texts]
        values = [-2 + 4 * int(found[-1]) / 10 for found in scores if found]
        if len(values) < len(texts):
            continue  # one that could not be read
        assert reading.scores == pytest.approx(values)
        for start, value, weight in zip(reading.starts, values, reading.weights, strict=True):
            assert weight == pytest.approx(1 - ((reward - value) / 4) ** 2, abs=1e-6)
            squares.append((reward - value) ** 2)
            if advantages[start] != 0:  # a token of the policy's
                assert advantages[start].item() == pytest.approx(reward - value, abs=1e-5)
                compared += 1
    assert compared > 4
    if len(squares) == sum(len(reading.ends) for reading in rollout["readings"]):
        assert trainer.state.log_history[0]["critic/mse"] == pytest.approx(sum(squares) / len(squares), rel=1e-4)


def test_rewards_outside_a_range_that_is_given_are_refused(model_dir, tmp_path):
    critic = genac_runs.fit_critic(tmp_path / "critic")
    trainer = genac_runs.make_trainer(model_dir, tmp_path, from_minus_2_to_2, critic=critic, reward_range=[0, 1])
    with pytest.raises(ValueError, match=r"outside `reward_range=\[0.0, 1.0\]` .* Set `reward_range` to them, or to"):
        trainer.train()


def test_a_genac_run_that_is_resumed_asks_about_the_range_that_it_has_learnt(model_dir, tmp_path):
    critic = genac_runs.fit_critic(tmp_path / "critic")
    settings = {"critic": critic, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = genac_runs.make_trainer(model_dir, tmp_path / "run", from_minus_2_to_2, **settings)
    whole.train()
    resumed = genac_runs.make_trainer(model_dir, tmp_path / "run", from_minus_2_to_2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert list(resumed.question.reward_range) == list(whole.question.reward_range) == [-2, 2]
    assert resumed.rollouts_seen[-1]["advantages"].equal(whole.rollouts_seen[-1]["advantages"])
