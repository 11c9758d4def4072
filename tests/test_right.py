"""Which reward functions say that a completion is right: for the language-modeling loss and for what is logged."""

import pytest
import sppo_runs
import vapo_runs
from tiny import tiny_model_dir

from trl_credit.credit_log.reader import Right, read_completions


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


def accuracy(completion_ids, **kwargs):
    return [0.0] * len(completion_ids)


def form(completion_ids, **kwargs):
    return [0.2] * len(completion_ids)


def half_right(completion_ids, **kwargs):
    return [1.0, 0.0] * (len(completion_ids) // 2)


def first_only(completion_ids, **kwargs):
    return [1.0] + [None] * (len(completion_ids) - 1)


def first_log(trainer):
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("functions", "settings", "share"),
    [
        ([accuracy, form], {}, 0.0),
        ([form, accuracy], {}, 0.0),
        ([accuracy, form], {"positive_reward_funcs": ["form"]}, 1.0),
        ([half_right, form], {}, 0.5),
        ([half_right, form], {"reward_weights": [0.8, 0.2]}, 0.5),
        ([half_right, accuracy], {"reward_weights": [1.0, 0.0]}, 0.5),  # one that is only looked at
        ([half_right, accuracy], {"reward_weights": [1.0, -1.0]}, 0.5),  # a penalty
        ([first_only, half_right], {}, 0.5),  # who gives no score does not decide
        ([first_only, half_right], {"positive_reward_funcs": ["first_only"]}, 0.25),
    ],
)
def test_a_completion_is_positive_where_each_deciding_function_says_so(functions, settings, share, model_dir, tmp_path):
    log = first_log(vapo_runs.make_trainer(model_dir, tmp_path, reward=functions, **settings))
    assert log["positive_lm/share"] == share
    assert ("critic/value_right_at_0" in log) == (share > 0)
    assert ("critic/value_wrong_at_0" in log) == (share < 1)


def test_of_one_function_the_threshold_is_on_its_weighted_reward(model_dir, tmp_path):
    settings = {"reward": vapo_runs.share_of_even, "reward_weights": [2.0], "positive_reward_threshold": 0.1}
    trainer = vapo_runs.make_trainer(model_dir, tmp_path, **settings)
    trainer.train()
    assert trainer.rollouts_seen[0]["positive"].any(1).tolist() == (trainer.rewards_seen[0] > 0.1).tolist()


def test_a_critic_of_prompts_tells_right_from_wrong_by_the_same_functions(model_dir, tmp_path):
    settings = {"reward": [accuracy, form], "reward_weights": [0.5, 2.5]}  # a sum of a half
    log = first_log(sppo_runs.make_trainer(model_dir, tmp_path / "a", reward_range=[0, 0.8], **settings))
    assert "critic/value_right" not in log and "critic/value_wrong" in log
    settings["positive_reward_funcs"] = ["form"]
    log = first_log(sppo_runs.make_trainer(model_dir, tmp_path / "b", reward_range=[0, 0.8], **settings))
    assert "critic/value_right" in log and "critic/value_wrong" not in log


@pytest.mark.parametrize("names", [["acuracy"], []])
def test_a_name_that_is_no_reward_functions_is_refused(names, model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"must be some of the reward functions, \['accuracy', 'form'\]"):
        vapo_runs.make_trainer(model_dir, tmp_path, reward=[accuracy, form], positive_reward_funcs=names)


@pytest.mark.parametrize(
    ("functions", "settings", "said"),
    [
        ([half_right], {}, "decided by 'half_right' ("),
        ([half_right, form], {}, "decided by 'half_right' and 'form', each of which must say so ("),
        ([half_right, form], {"positive_reward_funcs": ["half_right"]}, "decided by 'half_right' ("),
        ([half_right], {"reward_weights": [-1.0]}, "decided by the sum of all rewards ("),
    ],
)
def test_the_run_says_at_its_start_what_decides(functions, settings, said, model_dir, tmp_path, capsys):
    vapo_runs.make_trainer(model_dir, tmp_path, reward=functions, **settings).train()
    assert capsys.readouterr().out.count(said) == 1


def test_the_credit_log_knows_which_completions_were_right_and_the_viewer_what_said_so(model_dir, tmp_path):
    settings = {"log_credit": True, "log_credit_steps": 1, "positive_reward_threshold": 0.25}
    trainer = vapo_runs.make_trainer(model_dir, tmp_path, reward=[form, half_right], **settings)
    trainer.train()
    right = trainer.rollouts_seen[0]["positive"].any(1).tolist()
    completions, _ = read_completions(tmp_path)
    assert [c.right for c in completions] == right and set(right) == {False, True}
    assert {c.right_by for c in completions} == {"'form' and 'half_right' above 0.25"}
    asked, _ = read_completions(tmp_path, right=Right("form", 0.1))
    assert all(c.right for c in asked) and {c.right_by for c in asked} == {"form above 0.1"}


def test_a_completion_that_nobody_judged_is_neither_right_nor_wrong_in_the_credit_log(model_dir, tmp_path):
    vapo_runs.make_trainer(
        model_dir, tmp_path, reward=[form, first_only], positive_reward_funcs=["first_only"], log_credit=True
    ).train()
    assert [c.right for c in read_completions(tmp_path)[0]] == [True, None, None, None]
