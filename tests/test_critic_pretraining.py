"""Pretraining that is seen: a bar, steps and tables of its own; and no update that did not happen."""

import pandas
import pytest
from tiny import tiny_model_dir
from transformers import TrainerCallback
from vapo_runs import fixed_rollout, make_trainer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


class AsTensorBoard(TrainerCallback):
    """Keeps what TensorBoard would draw: numbers at `state.global_step`, by name."""

    def __init__(self):
        self.points: dict[str, list] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in logs.items():
            self.points.setdefault(name, []).append((state.global_step, value))


def test_pretraining_has_names_and_steps_of_its_own_in_every_integration(model_dir, tmp_path):
    trainer = make_trainer(
        model_dir, tmp_path, critic_pretraining_steps=4, max_steps=3, num_generations=2, logging_steps=2
    )
    trainer.add_callback(seen := AsTensorBoard())
    trainer.train()
    steps = {name: [step for step, _ in points] for name, points in seen.points.items()}
    for name in ("loss", "explained_variance", "explained_variance_within_prompt", "reward", "completions/mean_length"):
        assert steps[f"critic_pretraining/{name}"] == [2, 4], name
    assert steps["critic/loss"] == steps["reward"] == [2, 3] and steps["train_loss"] == [3]
    assert [value for _, value in seen.points["critic_pretraining/step"]] == [2, 4]
    assert trainer.state.global_step == 3


def test_what_came_after_the_last_log_of_the_pretraining_is_not_logged_as_training(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=3, logging_steps=2, max_steps=2)
    trainer.train()
    log = trainer.state.log_history
    assert [entry["step"] for entry in log if "critic_pretraining/loss" in entry] == [2, 3]
    assert not any(name.startswith("critic_pretraining") for name in log[2])


def test_pretraining_has_tables_of_its_own(model_dir, tmp_path):
    make_trainer(model_dir, tmp_path, critic_pretraining_steps=2, max_steps=2, log_completions=True).train()
    tables = {path.stem: pandas.read_parquet(path) for path in (tmp_path / "completions").glob("*.parquet")}
    names = [f"{kind}_0000{step}" for kind in ("critic_pretraining", "completions") for step in (1, 2)]
    assert sorted(tables) == sorted(names)
    assert [tables[name]["step"].unique().tolist() for name in names] == [[1], [2], [1], [2]]


def test_pretraining_says_what_it_does_and_shows_a_bar(model_dir, tmp_path, capsys):
    make_trainer(model_dir, tmp_path, critic_pretraining_steps=2, disable_tqdm=False).train()
    out, err = capsys.readouterr()
    assert "The critic is pretrained for 2 updates, 0 of which are done" in out
    assert "The critic's pretraining has ended after 2 updates on 2 rollouts, with an explained variance of" in out
    assert "Critic pretraining: 100%" in err and "explained_variance=" in err
    make_trainer(model_dir, tmp_path, critic_pretraining_steps=1).train()
    assert "Critic pretraining" not in capsys.readouterr().err, "`disable_tqdm=True`"


def nothing_twice(prompts, trainer):
    """Completions that are cut off, and thus masked, in every other rollout."""
    rollout = fixed_rollout(prompts, trainer)
    trainer.calls = getattr(trainer, "calls", 0) + 1
    if trainer.calls % 2:
        rollout["completion_ids"] = [[70] * 12 for _ in prompts]
        rollout["logprobs"] = [[0.0] * 12 for _ in prompts]
        rollout["env_mask"] = [[1] * 12 for _ in prompts]
    return rollout


def test_an_update_that_did_not_happen_is_not_counted(model_dir, tmp_path):
    settings = {"mask_truncated_completions": True, "critic_pretraining_steps": 3}
    trainer = make_trainer(model_dir, tmp_path, rollout=nothing_twice, **settings)
    assert trainer.pretrain_critic() == {"pretraining_steps": 3, "pretraining_rollouts": 6, "pretraining_done": 1}
    assert trainer.engine.steps == 3


def test_a_pretraining_with_nothing_to_learn_ends(model_dir, tmp_path):
    trainer = make_trainer(
        model_dir, tmp_path, critic_pretraining_steps=3, reward=lambda completions, **_: [None] * len(completions)
    )
    with pytest.raises(ValueError, match="found nothing to learn in 10 rollouts in a row"):
        trainer.pretrain_critic()


def test_updates_per_step_are_made_in_the_pretraining_too(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=5, critic_updates_per_step=2)
    assert trainer.pretrain_critic() == {"pretraining_steps": 5, "pretraining_rollouts": 3, "pretraining_done": 1}
    assert trainer.engine.steps == 5
