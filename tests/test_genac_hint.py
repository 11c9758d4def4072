"""What GenAC's critic is told of the policy, and what becomes of answers that cannot be read."""

import math

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from genac_runs import fit_critic, make_trainer
from tiny import tiny_model_dir
from vapo_runs import PROMPTS

from trl_credit.credit_log.reader import read_completions
from trl_credit.critics.generative.reading import with_stand_ins


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return fit_critic(tmp_path_factory.mktemp("critic"), unparsed=0.4)


def told(trainer, rollout):
    """The rates in the questions about a rollout."""
    decode = trainer.critic_processing_class.decode
    asked = [decode(ids) for reading in rollout["readings"] if reading for ids in reading.query.prompts()]
    return {float(text.split("user\n")[1].split(" ")[0]) for text in asked}


def test_a_hint_knows_nothing_of_the_rollout_that_it_is_about(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic, max_steps=3)
    trainer.train()
    total = weight = 0.0
    hint = 0.5  # nothing is known of the policy yet
    for rollout, rewards, entry in zip(
        trainer.rollouts_seen, trainer.rewards_seen, trainer.state.log_history, strict=False
    ):
        assert told(trainer, rollout) == {round(hint, 2)} and entry["critic/hint"] == pytest.approx(hint)
        total, weight = 0.9 * total + 0.1 * rewards.mean().item(), 0.9 * weight + 0.1
        hint = total / weight
    assert trainer.success_rate.value == pytest.approx(hint)


def test_an_evaluation_of_a_fresh_trainer_tells_what_it_has_measured_and_the_run_forgets_it(
    model_dir, critic, tmp_path
):
    data = {"eval_dataset": Dataset.from_dict({"prompt": PROMPTS}), "per_device_eval_batch_size": 4}
    trainer = make_trainer(model_dir, tmp_path, critic=critic, num_generations_eval=1, **data)
    for _ in range(2):
        trainer.evaluate()
    assert [told(trainer, rollout) for rollout in trainer.rollouts_seen] == 2 * [
        {0.5},
        {round(trainer.rewards_seen[0].mean().item(), 2)},
    ]
    trainer.train()
    assert told(trainer, trainer.rollouts_seen[4]) == {0.5}
    trainer.evaluate()
    assert told(trainer, trainer.rollouts_seen[-1]) == {round(trainer.success_rate.value, 2)}


def test_a_state_without_a_value_takes_that_of_the_state_before_it():
    nan = math.nan
    values = torch.tensor([[nan, 0.2, nan, nan, 0.8], [0.4, nan, 0.6, nan, nan], [nan, nan, nan, nan, nan]])
    expected = [[0.5, 0.2, 0.2, 0.2, 0.8], [0.4, 0.4, 0.6, 0.6, 0.6], [0.5] * 5]
    torch.testing.assert_close(with_stand_ins(values, 0.5), torch.tensor(expected))


def test_an_answer_that_was_not_read_is_flagged_in_the_table_and_has_no_value_in_the_log(model_dir, critic, tmp_path):
    trainer = make_trainer(
        model_dir, tmp_path, critic=critic, segment_lambda=0.0, log_credit=True, log_credit_steps=1, max_steps=1
    )
    trainer.train()
    (file,) = (tmp_path / "_credit").glob("*.parquet")
    read = unread = 0
    for row in pq.read_table(file).to_pylist():
        for k, segment in enumerate(row["segments"]):
            values = [row["value"][t] for t in range(segment["start"], segment["end"]) if row["trained"][t]]
            assert segment["read"] == (segment["value"] is not None)
            if segment["read"]:
                assert values == pytest.approx([segment["value"]] * len(values))
                read += 1
            else:
                assert all(value != value for value in values)
                unread += len(values) > 0
                before = row["segments"][k - 1] if k else None
                if (
                    before
                    and before["read"]
                    and values
                    and before["end"] - before["start"]
                    and k + 1 < len(row["segments"])
                ):
                    # With lambda 0 the advantage is the change of value over a segment: none into one not read.
                    assert before["advantage"] == pytest.approx(0, abs=1e-6)
    assert read > 2 and unread > 0
    completions, _ = read_completions(tmp_path)
    assert any(segment["value"] is None for completion in completions for segment in completion.segments)
