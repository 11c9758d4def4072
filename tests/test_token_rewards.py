"""Rewards per token: what a list may hold, and that functions do not get in each other's way."""

import pandas as pd
import pytest
from vapo_runs import LENGTH, PROMPTS, make_trainer

from trl_credit.credit_log.reader import CREDIT_FOLDER
from trl_credit.seam.user_functions import distinct_names


NAN, INF = float("nan"), float("inf")
ROOM = 4  # tokens of every completion


def four_tokens(prompts, trainer):
    ids = [[65 + row, 70, 71, trainer.processing_class.eos_token_id] for row in range(len(prompts))]
    assert ROOM < LENGTH
    return {
        "prompt_ids": trainer.processing_class(list(prompts))["input_ids"],
        "completion_ids": ids,
        "logprobs": [[0.0] * ROOM for _ in ids],
    }


def by_completion(**rows):
    """A reward function that gives the completion that starts with this letter this."""

    def reward(completion_ids, **kwargs):
        return [rows[chr(ids[0])] for ids in completion_ids]

    return reward


def run(model_dir, folder, *functions, **settings):
    """A step on four completions; their rewards as they fall, and the trainer."""
    trainer = make_trainer(model_dir, folder, list(functions), four_tokens, **settings)
    fallen = []
    before = trainer.rewards_where_they_fall
    trainer.rewards_where_they_fall = lambda *args: fallen.append(before(*args)) or fallen[-1]
    trainer.train()
    return fallen[0], trainer


@pytest.mark.parametrize("nothing", [None, NAN], ids=str)
def test_a_token_that_is_not_scored_earns_nothing_and_takes_nothing_from_other_functions(nothing, model_dir, tmp_path):
    steps = by_completion(
        A=[nothing, 0.5, nothing, 0.25], B=[0.5, 0.5, 0.5, 0.5], C=[nothing] * ROOM, D=[nothing, nothing, nothing, -1.0]
    )
    outcome = by_completion(A=1.0, B=2.0, C=3.0, D=None)
    fallen, trainer = run(model_dir, tmp_path, steps, outcome, reward_weights=[2.0, 1.0])
    expected = [[0, 1, 0, 0.5 + 1], [1, 1, 1, 1 + 2], [0, 0, 0, 3], [0, 0, 0, -2]]
    assert fallen.tolist() == expected
    (rewards,) = trainer.rewards_seen
    assert rewards.tolist() == [2.5, 6.0, 3.0, -2.0]
    log = trainer.state.log_history[0]
    assert log["rewards/reward/mean"] == pytest.approx((0.75 + 2.0 - 1.0) / 3) and log["rewards/unscored"] == 0
    assert all(weight.isfinite().all() for weight in trainer.critic.state_dict().values())


def test_a_completion_of_which_no_function_scores_a_token_is_not_scored(model_dir, tmp_path):
    function = by_completion(A=[None] * ROOM, B=[1.0] * ROOM, C=[NAN, None, None, NAN], D=None)
    _, trainer = run(model_dir, tmp_path, function)
    assert trainer.state.log_history[0]["rewards/unscored"] == 0.75
    assert trainer.rollouts_seen[0]["critic_mask"].sum(1).tolist() == [0, ROOM, 0, 0]


def test_nan_in_a_list_is_warned_of_once_and_none_is_not(model_dir, tmp_path, caplog):
    function = by_completion(A=[None] * ROOM, B=[1.0, NAN, NAN, None], C=1.0, D=1.0)
    with caplog.at_level("WARNING"):
        run(model_dir, tmp_path, function)
    warnings = [text for text in caplog.messages if "counts as not scored" in text]
    (warning,) = warnings
    assert "'reward' returned NaN for 2 of the tokens of completion 1, first for token 1: it counts as not" in warning


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.0, INF, -INF, 0.0], "'reward' returned inf for token 1 of completion 2"),
        ([0.0, 0.0, "0.5", 0.0], r"'reward' returned '0.5' \(str\) for token 2 of completion 2"),
        ([0.0, [1.0], 0.0, 0.0], r"'reward' returned \[1.0\] \(list\) for token 1 of completion 2"),
    ],
    ids=["infinity", "text", "list"],
)
def test_what_is_no_reward_is_refused_with_its_token(given, message, model_dir, tmp_path):
    function = by_completion(A=[0.0] * ROOM, B=0.0, C=given, D=0.0)
    with pytest.raises((ValueError, TypeError), match=message):
        run(model_dir, tmp_path, function)


# --- Two functions of one name


def test_two_functions_of_one_name_both_count_and_are_told_apart(model_dir, tmp_path):
    first = by_completion(A=[1.0, 0, 0, 0], B=[1.0, 0, 0, 0], C=[1.0, 0, 0, 0], D=[1.0, 0, 0, 0])
    second = by_completion(A=[0, 0.5, 0, 0], B=None, C=[0, 0.5, 0, 0], D=0.25)
    assert first.__name__ == second.__name__ == "reward"
    fallen, trainer = run(model_dir, tmp_path, first, second, log_completions=True, log_credit=True)
    assert fallen.tolist() == [[1, 0.5, 0, 0], [1, 0, 0, 0], [1, 0.5, 0, 0], [1, 0, 0, 0.25]]
    log = trainer.state.log_history[0]
    assert log["rewards/reward/mean"] == 1 and log["rewards/reward_2/mean"] == pytest.approx(1.25 / 3)
    (table,) = (tmp_path / "completions").glob("*.parquet")
    assert pd.read_parquet(table)["reward"].tolist() == [1.0] * len(PROMPTS[:4])
    assert pd.read_parquet(table)["reward_2"].dropna().tolist() == [0.5, 0.5, 0.25]
    (table,) = (tmp_path / CREDIT_FOLDER).glob("*.parquet")
    assert pd.read_parquet(table)["rewards"][0] == {"reward": 1.0, "reward_2": 0.5}


def test_numbered_names_are_nobodys():
    assert distinct_names(["a", "b", "a", "a_2", "a"]) == ["a", "b", "a_2", "a_2_2", "a_3"]
