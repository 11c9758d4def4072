"""An error in a reward function is the user's to see: it ends the run, with its own words."""

import pytest
import vapo_runs
from test_bad_input import Bench


def broken(completions, **kwargs):
    raise KeyError("no such column")


async def broken_later(completions, **kwargs):
    raise KeyError("no such column")


@pytest.mark.parametrize("reward", [broken, broken_later])
def test_an_exception_of_a_reward_function_ends_the_run(reward, model_dir, tmp_path):
    with pytest.raises(KeyError, match="no such column"):
        Bench(model_dir, tmp_path).train(reward=reward)
    with pytest.raises(KeyError, match="no such column"):
        vapo_runs.make_trainer(model_dir, tmp_path, reward=reward).train()
