"""What GenAC refuses, by the table of its page in the docs, and what it bears."""

import re
from pathlib import Path

import pytest
import torch
from genac_runs import fit_critic, make_trainer
from tiny import tiny_model, tiny_model_dir
from transformers import AutoModelForTokenClassification

from trl_credit import GenACConfig


BASE = {"bf16": False, "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4, "num_generations": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def critic_dir(tmp_path_factory):
    return fit_critic(tmp_path_factory.mktemp("critic"), context=8192)


def table() -> list[tuple[str, str]]:
    """Settings and messages of the table in the docs."""
    page = (Path(__file__).parents[1] / "docs/trainers/genac.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+=.*?)` \| (.*) \|$", page.split("## Bad input")[1], flags=re.MULTILINE)


@pytest.mark.parametrize(("settings", "message"), table())
def test_a_config_that_cannot_be_meant_is_refused_as_the_docs_say(settings, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        GenACConfig(str(tmp_path), **{**BASE, **eval(f"dict({settings})")})
    assert message in str(caught.value)


def test_the_table_is_read():
    assert len(table()) == 30


def completions(*texts):
    """A rollout of these completions, over and over; each ends with EOS."""

    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        written = [texts[row % len(texts)] for row in range(len(prompts))]
        ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in written]
        return {
            "prompt_ids": tokenizer(list(prompts))["input_ids"],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(row) for row in ids],
        }

    return rollout


def between_two_values(completions, **kwargs):
    """A reward that no advantage is 0 for."""
    return [0.55] * len(completions)


def logged(trainer, name):
    return [entry[f"critic/{name}"] for entry in trainer.state.log_history if f"critic/{name}" in entry]


def assert_nothing_is_nan(trainer):
    for rollout in trainer.rollouts_seen:
        assert rollout["advantages"].isfinite().all()
    for network in (trainer.model, trainer.critic):
        assert all(p.isfinite().all() for p in network.parameters())
    numbers = ("loss", "mse", "parse_rate", "reward", "value_mean", "hint", "segments")
    assert all(value == value for name in numbers for value in logged(trainer, name))


def changed(network, start):
    return any(not torch.equal(p, start[name]) for name, p in network.state_dict().items())


def start_of(network):
    return {name: p.clone() for name, p in network.state_dict().items()}


@pytest.mark.slow
def test_a_completion_of_4096_tokens_without_a_delimiter_is_cut_and_every_token_has_its_credit(
    model_dir, critic_dir, tmp_path
):
    settings = {"segment_min_length": 300, "segment_target_length": 600, "segment_max_length": 900}
    settings |= {"max_completion_length": 4097, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    trainer = make_trainer(
        model_dir, tmp_path, between_two_values, critic=critic_dir, rollout=completions("a" * 4096), **settings
    )
    trainer.train()
    (reading,) = trainer.rollouts_seen[0]["readings"]
    lengths = [end - start for start, end in zip([0, *reading.ends[:-1]], reading.ends, strict=True)]
    assert sum(lengths) == 4097 and all(300 <= length <= 900 for length in lengths)
    assert [len(answer) > 0 for answer in reading.answers] == [True] * len(lengths)
    assert trainer.rollouts_seen[0]["advantages"].ne(0).all()
    assert_nothing_is_nan(trainer)


def test_a_critic_that_never_parses_is_counted_and_learns_nothing_and_the_actor_has_the_mean_for_its_baseline(
    model_dir, tmp_path
):
    trainer = make_trainer(model_dir, tmp_path, max_steps=2)  # the policy's checkpoint, which has learned nothing
    start = start_of(trainer.critic)
    trainer.train()
    assert logged(trainer, "parse_rate") == [0, 0] and logged(trainer, "reward") == [0, 0]
    assert logged(trainer, "loss") == [0, 0] and not changed(trainer.critic, start)
    assert len(logged(trainer, "mse_of_parsed")) == 0, "counts nothing"
    hints = logged(trainer, "hint")
    for rollout, rewards, hint in zip(trainer.rollouts_seen, trainer.rewards_seen, hints, strict=True):
        trained = trainer.trained_tokens(rollout)
        expected = torch.where(trained, rewards.unsqueeze(1) - hint, 0)
        torch.testing.assert_close(rollout["advantages"], expected, rtol=0, atol=1e-6)
    assert_nothing_is_nan(trainer)


@pytest.mark.slow
def test_a_failed_answer_has_the_value_of_the_state_before_it_or_else_the_running_mean_and_is_not_dropped(
    model_dir, tmp_path
):
    critic = fit_critic(tmp_path / "critic", unparsed=0.6)
    trainer = make_trainer(model_dir, tmp_path, critic=critic, max_steps=4, critic_baseline="none")
    trainer.train()
    mean = weight = failed = carried = 0.0
    for rollout, rewards in zip(trainer.rollouts_seen, trainer.rewards_seen, strict=True):
        scores = [score for reading in rollout["readings"] for score in reading.scores]
        values = [score for score in scores if score is not None]
        if values:
            mean, weight = 0.9 * mean + 0.1 * sum(values) / len(values), 0.9 * weight + 0.1
        for row, reading in enumerate(rollout["readings"]):
            assert len(reading.scores) == len(reading.weights) == len(reading.answers) == len(reading.ends)
            for k, score in enumerate(reading.scores):
                if score is None:
                    failed += 1
                    assert reading.weights[k] == 0 and len(reading.answers[k]) > 0
                    tokens = rollout["advantages"][row, ([0] + reading.ends)[k] : reading.ends[k]]
                    tokens = tokens[tokens != 0]  # not a tool's
                    before = [score for score in reading.scores[:k] if score is not None]
                    carried += len(before) > 0
                    baseline = before[-1] if before else mean / weight
                    torch.testing.assert_close(tokens, (rewards[row] - baseline).expand(len(tokens)))
    assert failed > 3 and carried > 1
    assert_nothing_is_nan(trainer)


def test_an_empty_completion_has_one_state_the_prompt(model_dir, critic_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic_dir, rollout=completions("", "abcdefgh"))
    trainer.train()
    empty, other = trainer.rollouts_seen[0]["readings"][:2]
    assert empty.ends == [1] and len(empty.answers) == 1 and len(other.ends) > 1
    assert empty.query.prompts()[0][: empty.query.cuts[0]] == empty.query.shared_ids
    assert_nothing_is_nan(trainer)


def test_states_that_leave_the_critic_no_room_are_counted_and_have_the_running_mean(model_dir, tmp_path):
    critic = fit_critic(tmp_path / "critic", context=62)
    trainer = make_trainer(model_dir, tmp_path, between_two_values, critic=critic, rollout=completions("a" * 11))
    trainer.train()
    heard = [[len(answer) > 0 for answer in reading.answers] for reading in trainer.rollouts_seen[0]["readings"]]
    assert all(row[0] for row in heard), "the prompt alone is always asked about"
    (share,) = logged(trainer, "states_without_room")
    flat = [is_heard for row in heard for is_heard in row]
    assert 0 < share == pytest.approx(1 - sum(flat) / len(flat))
    assert trainer.rollouts_seen[0]["advantages"].ne(0).all()
    assert_nothing_is_nan(trainer)


def test_a_problem_that_fills_the_critics_context_is_refused_by_name(model_dir, tmp_path):
    critic = fit_critic(tmp_path / "critic", context=50)
    trainer = make_trainer(model_dir, tmp_path, critic=critic)
    with pytest.raises(ValueError, match="context of 50"):
        trainer.train()


@pytest.mark.parametrize("reward", [1.5, -0.5])
def test_a_reward_outside_a_range_that_is_given_is_refused(reward, model_dir, critic_dir, tmp_path):
    def rewards(completions, **kwargs):
        return [0.5] * (len(completions) - 1) + [reward]

    trainer = make_trainer(model_dir, tmp_path, rewards, critic=critic_dir, reward_range=[0, 1])
    with pytest.raises(ValueError, match=rf"{reward} of completion 3 .*\[0.0, 1.0\]"):
        trainer.train()


def test_a_batch_without_any_reward_moves_neither_network(model_dir, critic_dir, tmp_path):
    def none(completions, **kwargs):
        return [None] * len(completions)

    trainer = make_trainer(model_dir, tmp_path, none, critic=critic_dir)
    policy, critic = start_of(trainer.model), start_of(trainer.critic)
    trainer.train()
    assert not changed(trainer.model, policy) and not changed(trainer.critic, critic)
    assert trainer.success_rate.weight == trainer.mean_value.weight == 0
    assert trainer.rollouts_seen[0]["readings"] == [None] * 4


def test_a_critic_that_cannot_write_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="The critic is given twice"):
        make_trainer(model_dir, tmp_path, critic=str(model_dir), critic_model_name_or_path=str(model_dir))
    values = AutoModelForTokenClassification.from_pretrained(model_dir, num_labels=1)
    with pytest.raises(ValueError, match="Qwen2ForTokenClassification"):
        make_trainer(model_dir, tmp_path, critic=values)
    tiny_model().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="comes without a tokenizer"):
        make_trainer(model_dir, tmp_path, critic=str(tmp_path / "bare"))


def test_patience_without_evaluation_data_is_refused(model_dir, critic_dir, tmp_path):
    settings = {"critic_pretraining_steps": 2, "critic_pretraining_patience": 1}
    trainer = make_trainer(model_dir, tmp_path, critic=critic_dir, **settings)
    with pytest.raises(ValueError, match="`critic_pretraining_patience`.*`eval_dataset`"):
        trainer.train()


def test_a_segmenter_that_loses_tokens_is_refused(model_dir, critic_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic_dir, segmenter=lambda ids, tokenizer, trained: [1])
    with pytest.raises(ValueError, match="segmenter.*strictly increasing"):
        trainer.train()


def test_rewards_of_sums_may_be_a_rounding_error_above_1(model_dir, critic_dir, tmp_path):
    def almost(completions, **kwargs):
        return [1 + 1e-7] * len(completions)

    trainer = make_trainer(model_dir, tmp_path, almost, critic=critic_dir)
    trainer.train()
    assert len(logged(trainer, "loss")) == 1
