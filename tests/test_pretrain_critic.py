"""Value pretraining as a thing of its own, and what it makes: a critic for later runs."""

import copy
import json
import sys

import pytest
import torch
from launch import BIN, run
from safetensors.torch import load_file
from vapo_runs import make_trainer

from trl_credit import VAPOConfig
from trl_credit.cli.launch import with_recipe
from trl_credit.methods import METHODS
from trl_credit.scripts.train import make_parser


def test_a_pretrained_critic_is_saved_and_serves_a_later_run(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path / "a", critic_pretraining_steps=3, critic_learning_rate=1e-2)
    policy = copy.deepcopy(trainer.model.state_dict())
    assert trainer.pretrain_critic() == {"pretraining_steps": 3, "pretraining_rollouts": 3, "pretraining_done": 1}
    assert trainer.engine.steps == 3 and trainer.state.global_step == 0
    assert all(torch.equal(policy[name], p) for name, p in trainer.model.state_dict().items())

    later = make_trainer(model_dir, tmp_path / "b", critic=tmp_path / "a" / "critic")
    assert all(torch.equal(a, b) for a, b in zip(later.critic.parameters(), trainer.critic.parameters(), strict=True))
    later.train()
    assert later.engine.steps == 1
    assert later.state.log_history[0]["critic/value_max"] > later.state.log_history[0]["critic/value_min"]


def test_pretraining_goes_on_after_it_was_interrupted(model_dir, tmp_path):
    settings = {"critic_pretraining_steps": 4, "save_strategy": "steps", "save_steps": 2, "critic_learning_rate": 1e-2}
    whole = make_trainer(model_dir, tmp_path / "whole", **settings)
    whole.pretrain_critic()

    class Interrupted(RuntimeError):
        pass

    def interrupt(*args):
        if trainer._pretraining["pretraining_steps"] == 3:
            raise Interrupted
        return update(*args)

    trainer = make_trainer(model_dir, tmp_path / "parts", **settings)
    update, trainer.update_critic = trainer.update_critic, interrupt
    with pytest.raises(Interrupted):
        trainer.pretrain_critic()
    resumed = make_trainer(model_dir, tmp_path / "parts", **settings)
    assert resumed.pretrain_critic(resume_from_checkpoint=True)["pretraining_steps"] == 4
    assert all(torch.equal(a, b) for a, b in zip(resumed.critic.parameters(), whole.critic.parameters(), strict=True))


@pytest.mark.parametrize(
    ("threshold", "steps"),
    [
        ({"critic_pretraining_loss_threshold": 1e9}, 1),
        ({"critic_pretraining_explained_variance_threshold": -1e9}, 1),
        ({"critic_pretraining_explained_variance_threshold": 0.999}, 5),
        ({"critic_pretraining_loss_threshold": 1e9, "critic_pretraining_explained_variance_threshold": 0.999}, 5),
    ],
)
def test_pretraining_ends_early_when_all_thresholds_that_are_set_are_met(threshold, steps, model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=5, **threshold)
    assert trainer.pretrain_critic()["pretraining_steps"] == steps


def test_several_critic_updates_for_a_policy_step(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_updates_per_step=3, max_steps=2)
    trainer.train()
    assert trainer.engine.steps == 6 and trainer.state.global_step == 2


def test_the_completions_table_has_a_few_values_of_each_completion_in_few_digits(model_dir, tmp_path):
    import pandas

    trainer = make_trainer(model_dir, tmp_path, log_completions=True, max_steps=2, critic_learning_rate=1e-1)
    trainer.train()
    rollout = trainer.rollouts_seen[1]
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert len(table) == len(rollout["values"])
    for shown, values, mask in zip(table["values"], rollout["values"], rollout["critic_mask"], strict=True):
        values = values[mask].tolist()
        numbers = [float(number) for number in shown.split(" ")]
        assert len(numbers) == 5 and len(shown) <= 5 * 7
        assert numbers[0] == pytest.approx(values[0], abs=0.005) and numbers[4] == pytest.approx(values[-1], abs=0.005)


# --- The commands


@pytest.mark.parametrize("name", ["vapo", "vc_ppo", "ppo"])
def test_every_recipe_is_read_by_the_parser_and_is_what_it_is_called(name):
    base = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--bf16", "false", "--use_cpu"]
    _, args, _, _ = make_parser("vapo").parse_args_and_config(
        [*with_recipe(["--config", name], METHODS["vapo"].recipes), *base]
    )
    assert isinstance(args, VAPOConfig)
    expected = {
        "vapo": ("length_adaptive", 1.0, 800, 0.28, 0.1),
        "vc_ppo": (0.95, 1.0, 800, 0.2, 0.0),
        "ppo": (0.95, 0.95, 0, 0.2, 0.0),
    }
    settings = args.policy_lambda, args.critic_lambda, args.critic_pretraining_steps, args.epsilon_high
    assert (*settings, args.positive_lm_coef) == expected[name]
    # On 8 processes the papers' rollouts, and 16 updates on each, the last 15 of which the clip is for.
    completions = 8 * args.per_device_train_batch_size
    assert completions * args.steps_per_generation == 512 * 16
    assert completions * args.gradient_accumulation_steps == 512
    assert args.critic_pretraining_steps in (0, 50 * args.steps_per_generation // args.gradient_accumulation_steps)


@pytest.mark.slow
def test_the_commands_pretrain_a_critic_and_then_train_with_it(model_dir, tmp_path):
    problems = [{"prompt": prompt, "solution": "7"} for prompt in ("a", "bc", "d e", "fgh")]
    (tmp_path / "problems.jsonl").write_text("\n".join(json.dumps(problem) for problem in problems))
    (tmp_path / "my_rewards.py").write_text(
        "def short(completion_ids, **k): return [1 / len(c) for c in completion_ids]"
    )
    (tmp_path / "data.yaml").write_text("datasets:\n  - path: json\n    data_files: problems.jsonl\n")
    common = [
        *["--model_name_or_path", model_dir, "--reward_funcs", "my_rewards.short", "--config", "data.yaml"],
        *[
            "--use_cpu",
            "--bf16",
            "false",
            "--report_to",
            "none",
            "--max_completion_length",
            "6",
            "--num_processes",
            "1",
        ],
        *["--per_device_train_batch_size", "4", "--num_generations", "1", "--max_steps", "2", "--save_steps", "2"],
    ]
    command = [
        BIN / "trl-credit",
        "pretrain-critic",
        *common,
        "--critic_pretraining_steps",
        "2",
        "--output_dir",
        "first",
    ]
    run([sys.executable, *command], cwd=tmp_path)
    assert not (tmp_path / "first" / "model.safetensors").exists()  # the policy is as it was
    critic = load_file(tmp_path / "first" / "critic" / "model.safetensors")
    assert critic["score.weight"].abs().max() > 0
    command = [
        *[BIN / "trl-credit", "vapo", *common, "--critic_pretraining_steps", "0", "--output_dir", "second"],
        *["--critic_model_name_or_path", "first/critic", "--policy_lambda", "0.9"],
    ]
    run([sys.executable, *command], cwd=tmp_path)
    assert (tmp_path / "second" / "model.safetensors").exists()
    assert (tmp_path / "second" / "critic" / "config.json").exists()
    state = torch.load(tmp_path / "second" / "checkpoint-2" / "critic_state.pt", weights_only=True)
    assert state["steps"] == 2
    # The critic of 16 has the highest rate that there is by default: 0.1 / 16 would be more.
    assert "Learning rate: 0.001, of its head 0.001." in (tmp_path / "second/critic/README.md").read_text()
