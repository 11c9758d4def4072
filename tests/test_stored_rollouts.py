"""A critic's pretraining on stored rollouts: written once, read without the policy, several passes, the best kept."""

import copy
import json
import shutil
from collections import Counter

import pytest
import sppo_runs
import torch
import vapo_runs
from datasets import Dataset
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM, TrainerCallback
from vapo_runs import Watched

from trl_credit import GenACConfig, SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer
from trl_credit.scripts.pretrain import make_parser, pretrainer


# 4 rollouts of 4 completions, 2 of each prompt, of which there are 8; 2 are held out, so that a pass has 3 rollouts.
SETTINGS = {
    "critic_pretraining_steps": 4,
    "critic_pretraining_epochs": 3,
    "critic_pretraining_held_out": 0.25,
    "num_generations": 2,
    "critic_learning_rate": 1e-2,
    "critic_head_learning_rate": 1e-2,
}
SAMPLED = {"rollout": None}  # by the policy, with random numbers


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


def vapo(model_dir, folder, rollouts, **settings):
    settings = {"trainer": VAPOTrainer, **SETTINGS, "critic_pretraining_rollouts": str(rollouts), **settings}
    return vapo_runs.make_trainer(model_dir, folder, **settings)


def sppo(model_dir, folder, rollouts, **settings):
    settings = {"trainer": SPPOTrainer, **SETTINGS, "critic_pretraining_rollouts": str(rollouts), **settings}
    return sppo_runs.make_trainer(model_dir, folder, **settings)


def never(*args, **kwargs):
    raise AssertionError("something was generated")


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def held_out_error(trainer):
    passes = trainer._passes
    rollouts = [trainer._take_up_share(passes, rows) for rows in passes.of_held_out()]
    sums = torch.cat([trainer.critic_fit(*rollout) for rollout in rollouts]).sum(0)
    return (sums[4] / sums[0]).item()


class Killed(RuntimeError):
    pass


# --- Written once


@pytest.mark.parametrize("make_trainer", [vapo, sppo])
@pytest.mark.slow
def test_rollouts_are_written_once_and_whoever_reads_them_generates_nothing(make_trainer, model_dir, tmp_path):
    writer = make_trainer(model_dir, tmp_path / "a", tmp_path / "rollouts")
    done = writer.pretrain_critic()
    assert len(list((tmp_path / "rollouts").glob("*.arrow"))) == 4
    assert done["pretraining_rollouts"] == done["pretraining_steps"] > 0
    reader = make_trainer(model_dir, tmp_path / "b", tmp_path / "rollouts")
    reader.rollout_func = reader._generate_and_score_completions = reader._generate_and_score = never
    assert reader.pretrain_critic() == done
    assert torch.equal(weights(writer.critic), weights(reader.critic))
    errors = logged(reader, "critic_pretraining/held_out_error")
    assert errors == logged(writer, "critic_pretraining/held_out_error")
    assert len(errors) == done["pretraining_rollouts"] // 3


def rows_of(rollouts, rewards):
    """Everything that counts of each completion, without its padding."""
    rows = Counter()
    for rollout, reward in zip(rollouts, rewards, strict=True):
        for row in range(len(reward)):
            prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()].tolist()
            completion = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()].tolist()
            # Sums over another padding are rounded in another way.
            returns = [round(x, 4) for x in rollout["returns"][row, : len(completion)].tolist()]
            mask = rollout["critic_mask"][row, : len(completion)].tolist()
            positive = rollout["positive"][row].any().item()
            rows[json.dumps([prompt, completion, returns, mask, positive, round(reward[row].item(), 4)])] += 1
    return rows


def now_and_then(completion_ids, **kwargs):
    return [None if len(ids) % 4 == 3 else 0.1 * len(ids) for ids in completion_ids]


@pytest.mark.parametrize(
    "settings",
    [{"reward": [vapo_runs.even_tokens, now_and_then], "reward_weights": [0.5, 2.0]}, {"reward": now_and_then}],
    ids=["token rewards", "unscored"],
)
@pytest.mark.slow
def test_what_is_read_is_what_was_generated(settings, model_dir, tmp_path):
    """Tool tokens, rewards per token, completions without a reward, and the functions that say what is right."""
    still = {**SETTINGS, "critic_learning_rate": 0.0, "critic_head_learning_rate": 0.0, "critic_initial_value": 0.25}
    still.pop("critic_pretraining_epochs")
    still.pop("critic_pretraining_held_out")
    fresh = vapo_runs.make_trainer(model_dir, tmp_path / "fresh", **still, **settings)
    fresh.pretrain_critic()
    stored = vapo(
        model_dir,
        tmp_path / "stored",
        tmp_path / "rollouts",
        trainer=Watched,
        **still | settings,
        critic_pretraining_epochs=2,
        critic_pretraining_held_out=0.0,
        critic_lambda=1.0,
    )
    stored.pretrain_critic()
    expected = rows_of(fresh.rollouts_seen, fresh.rewards_seen)
    assert len(expected) == 16
    for number in range(2):
        seen = slice(4 * number, 4 * number + 4)
        assert rows_of(stored.rollouts_seen[seen], stored.rewards_seen[seen]) == expected
    assert len(stored.rollouts_seen) == 8


@pytest.mark.slow
def test_a_killed_run_loses_no_rollout_and_the_next_one_writes_the_rest_as_it_would_have(model_dir, tmp_path):
    (whole := vapo(model_dir, tmp_path / "a", tmp_path / "whole", **SAMPLED)).pretrain_critic()
    killed = vapo(model_dir, tmp_path / "b", tmp_path / "parts", **SAMPLED)
    generate, calls = killed._generate_and_score, []

    def killed_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return generate(*args, **kwargs)

    killed._generate_and_score = killed_at_the_third
    with pytest.raises(Killed):
        killed.pretrain_critic()
    assert len(list((tmp_path / "parts").glob("*.arrow"))) == 2
    (tmp_path / "parts" / "rollout_00002.arrow.partial").write_bytes(b"half of it")
    torch.manual_seed(7)  # the numbers of the run do not matter
    resumed = vapo(model_dir, tmp_path / "b", tmp_path / "parts", **SAMPLED)
    resumed.pretrain_critic()
    assert logged(resumed, "critic_pretraining_rollouts/step") == [3, 4]
    for file in (tmp_path / "whole").glob("*.arrow"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes(), file.name
    assert torch.equal(weights(whole.critic), weights(resumed.critic))


@pytest.mark.slow
def test_the_folder_grows_when_more_are_asked_for_and_the_first_are_enough_for_less(model_dir, tmp_path):
    vapo(model_dir, tmp_path / "a", tmp_path / "rollouts", critic_pretraining_steps=2).pretrain_critic()
    first = {file.name: file.read_bytes() for file in (tmp_path / "rollouts").glob("*.arrow")}
    assert len(first) == 2
    more = vapo(model_dir, tmp_path / "b", tmp_path / "rollouts", critic_pretraining_steps=5, critic_updates_per_step=2)
    more.pretrain_critic()
    assert len(list((tmp_path / "rollouts").glob("*.arrow"))) == 3, "two updates on each"
    assert all((tmp_path / "rollouts" / name).read_bytes() == content for name, content in first.items())
    less = vapo(model_dir, tmp_path / "c", tmp_path / "rollouts", critic_pretraining_steps=1)
    less._generate_and_score = never
    less.pretrain_critic()
    assert len(less._passes.data) == 4


# --- Whose they are


def other_reward(completion_ids, **kwargs):
    return [0.0 for _ in completion_ids]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "`temperature` was 1.0 and is 0.7"),
        ({"max_completion_length": 11}, "`max_completion_length` was 12 and is 11"),
        ({"num_generations": 1}, "`num_generations` was 2 and is 1"),
        ({"mask_truncated_completions": True}, "`mask_truncated_completions` was False and is True"),
        ({"reward": other_reward}, r"`reward_funcs` was \['share_of_even'\] and is \['other_reward'\]"),
        ({"rollout": None}, "`rollout_func` was 'fixed_rollout' and is None"),
        (
            {"critic_pretraining_steps": 8, "seed": 3},
            "To write more, these must be as they were: `seed` was 42 and is 3",
        ),
        (
            {"critic_pretraining_steps": 3, "per_device_train_batch_size": 8},
            "holds 16 completions, and 24 are asked for .* `generation_batch_size` was 4 and is 8",
        ),
    ],
)
def test_rollouts_of_another_run_are_refused_by_name(settings, message, model_dir, tmp_path, written):
    with pytest.raises(ValueError, match=message):
        vapo(model_dir, tmp_path, written, **settings).pretrain_critic()


@pytest.fixture(scope="module")
def written(model_dir, tmp_path_factory):
    """A folder with all rollouts, for those who only read them."""
    folder = tmp_path_factory.mktemp("written") / "rollouts"
    vapo(model_dir, tmp_path_factory.mktemp("run"), folder, critic_pretraining_epochs=1).pretrain_critic()
    return folder


def test_rollouts_of_another_policy_or_of_other_prompts_are_refused(model_dir, tmp_path, written, monkeypatch):
    policy = AutoModelForCausalLM.from_pretrained(model_dir)
    vapo(policy, tmp_path / "same", written)
    with torch.no_grad():
        policy.lm_head.weight[0] += 1
    with pytest.raises(ValueError, match="are not those of this run: `weights` was '[0-9a-f]{16}' and is '"):
        vapo(policy, tmp_path / "moved", written)
    monkeypatch.setattr(vapo_runs, "PROMPTS", ["ba", *vapo_runs.PROMPTS[1:]])
    with pytest.raises(ValueError, match="`prompts` was '[0-9a-f]{16}' and is '"):
        vapo(model_dir, tmp_path / "others", written)


def test_another_seed_batch_size_and_weights_of_rewards_read_the_same_rollouts(model_dir, tmp_path, written):
    settings = {"seed": 5, "per_device_train_batch_size": 8, "critic_pretraining_steps": 2, "reward_weights": [2.0]}
    trainer = vapo(model_dir, tmp_path, written, trainer=Watched, critic_pretraining_epochs=1, **settings)
    trainer._generate_and_score = never
    trainer.pretrain_critic()
    assert [len(rewards) for rewards in trainer.rewards_seen] == [8, 8]
    halves = vapo(model_dir, tmp_path / "b", written, trainer=Watched, critic_pretraining_epochs=1)
    halves.pretrain_critic()
    rewards, ones = (torch.cat(t.rewards_seen) for t in (trainer, halves))
    assert rewards.isnan().sum() == 4, "what fills up the last rollout counts nowhere"
    assert torch.equal(rewards[rewards.isfinite()].sort().values, 2 * ones.sort().values)


def test_a_folder_with_something_else_in_it_is_left_alone(model_dir, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter_1.tex").write_text("It was a dark and stormy night.")
    with pytest.raises(ValueError, match="holds no manifest.json, but other files"):
        vapo(model_dir, tmp_path / "a", tmp_path / "thesis")


def test_a_critic_with_a_prompt_of_its_own_finds_the_columns_that_it_names(model_dir, tmp_path):
    """The policy's prompt has no solution in it."""
    data = Dataset.from_dict({"prompt": vapo_runs.PROMPTS, "solution": [f"<{n}>" for n in range(8)]})
    settings = {"prompts": data, "critic_prompt_template": "{prompt}{solution}", "trainer": sppo_runs.Watched}
    whole = {"critic_pretraining_epochs": 1, "critic_pretraining_held_out": 0.0}
    sppo(model_dir, tmp_path / "a", tmp_path / "rollouts", **settings, **whole).pretrain_critic()
    reader = sppo(model_dir, tmp_path / "b", tmp_path / "rollouts", **settings, **whole)
    reader._generate_and_score = never
    reader.pretrain_critic()
    prompts = [row[row >= 0] for rollout in reader.rollouts_seen for row in rollout["critic_prompts"]]
    read = {reader.processing_class.decode(prompt) for prompt in prompts}
    assert read == {f"{prompt}<{number}>" for number, prompt in enumerate(vapo_runs.PROMPTS)}


def test_a_damaged_file_is_named(model_dir, tmp_path, written):
    shutil.copytree(written, tmp_path / "rollouts")
    file = tmp_path / "rollouts" / "rollout_00001.arrow"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="rollout_00001.arrow cannot be read"):
        vapo(model_dir, tmp_path / "run", tmp_path / "rollouts").pretrain_critic()


# --- Passes


def prompts_of(rollouts):
    return [
        tuple(rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()].tolist())
        for rollout in rollouts
        for row in range(len(rollout["prompt_ids"]))
    ]


def test_each_pass_reads_every_completion_once_in_an_order_of_its_own_and_nothing_that_is_held_out(
    model_dir, tmp_path, written
):
    trainer = vapo(model_dir, tmp_path, written, trainer=Watched, critic_pretraining_patience=None)
    done = trainer.pretrain_critic()
    assert (done["pretraining_rollouts"], done["pretraining_steps"]) == (9, 9)
    passes = [prompts_of(trainer.rollouts_seen[first : first + 3]) for first in (0, 3, 6)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert Counter(passes[0]) == Counter(passes[1]) == Counter(passes[2])
    assert set(Counter(passes[0]).values()) == {2} and len(set(passes[0])) == 6
    rows = [row for rows in trainer._passes.of_held_out() for row in trainer._passes.data[rows]["row"]]
    held_out = {tuple(trainer.processing_class(json.loads(row)["prompt"])["input_ids"]) for row in rows}
    assert len(held_out) == 2 and not held_out & set(passes[0])


@pytest.mark.slow
def test_the_critic_with_the_lowest_held_out_error_is_kept(model_dir, tmp_path, written):
    wild = {"critic_learning_rate": 0.3, "critic_head_learning_rate": 0.3, "critic_pretraining_epochs": 5}
    trainer = vapo(model_dir, tmp_path / "a", written, critic_pretraining_patience=None, **wild)
    trainer.pretrain_critic()
    errors = logged(trainer, "critic_pretraining/held_out_error")
    assert len(errors) == 5 and errors[-1] > min(errors), "else there is nothing to go back to"
    assert held_out_error(trainer) == pytest.approx(min(errors), rel=1e-6)
    impatient = vapo(model_dir, tmp_path / "b", written, critic_pretraining_patience=1, **wild)
    done = impatient.pretrain_critic()
    worse = next(
        number for number, (one, next_one) in enumerate(zip(errors, errors[1:], strict=False)) if next_one >= one
    )
    assert worse < 4, "else patience has ended nothing"
    assert logged(impatient, "critic_pretraining/held_out_error") == errors[: worse + 2]
    assert done["pretraining_rollouts"] == 3 * (worse + 2) and done["since"] == 1
    assert held_out_error(impatient) == pytest.approx(errors[worse], rel=1e-6)


def test_with_nothing_held_out_the_last_critic_is_kept(model_dir, tmp_path, written):
    trainer = vapo(model_dir, tmp_path, written, critic_pretraining_held_out=0.0, critic_pretraining_epochs=2)
    assert trainer.pretrain_critic()["pretraining_rollouts"] == 2 * 4
    assert logged(trainer, "critic_pretraining/held_out_error") == []
    assert not (tmp_path / "_best_critic").exists()


def test_held_out_numbers_are_those_of_all_rollouts_together(model_dir, tmp_path, written):
    """Against a loop over the completions, of which half are held out: two rollouts of them."""
    trainer = vapo(model_dir, tmp_path, written, critic_pretraining_held_out=0.5, critic_pretraining_epochs=1)
    trainer.pretrain_critic()
    returns, errors = [], []
    for rows in trainer._passes.of_held_out():
        rollout, rewards = trainer._take_up_share(trainer._passes, rows)
        values, mask = trainer.state_values(rollout), trainer.trained_tokens(rollout)
        for row, reward in enumerate(rewards.tolist()):
            for t in mask[row].nonzero().flatten().tolist():
                returns.append(reward)
                errors.append(reward - values[row, t].item())
    returns, errors = (torch.tensor(x, dtype=torch.float64) for x in (returns, errors))
    [error], [explained] = (
        logged(trainer, f"critic_pretraining/held_out_{n}") for n in ("error", "explained_variance")
    )
    assert error == pytest.approx(errors.square().mean().item(), rel=1e-6)
    assert explained == pytest.approx(1 - (errors.var() / returns.var()).item(), abs=1e-6)


@pytest.mark.parametrize("kill_at", [1, 4, 8])
@pytest.mark.slow
def test_killed_in_a_pass_and_resumed_is_never_killed_to_the_bit(kill_at, model_dir, tmp_path):
    settings = {**SAMPLED, "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "adamw_torch"}
    settings |= {"critic_lr_scheduler_type": "linear", "critic_pretraining_patience": None}
    (whole := vapo(model_dir, tmp_path / "whole", tmp_path / "rollouts", **settings)).train()
    killed = vapo(model_dir, tmp_path / "parts", tmp_path / "rollouts", **settings)
    update = killed.update_critic

    def killed_at(*args):
        if killed._pretraining["pretraining_steps"] == kill_at:
            raise Killed
        return update(*args)

    killed.update_critic = killed_at
    with pytest.raises(Killed):
        killed.train()
    resumed = vapo(model_dir, tmp_path / "parts", tmp_path / "rollouts", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole.critic), weights(resumed.critic))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert resumed._pretraining == whole._pretraining and resumed.engine.steps == 9 + 2
    assert resumed.engine.learning_rates == whole.engine.learning_rates == {"learning_rate": 0.0}


@pytest.mark.slow
def test_the_policy_goes_on_as_if_its_rollouts_had_always_been_there(model_dir, tmp_path):
    settings = {**SAMPLED, "max_steps": 2}
    (writer := vapo(model_dir, tmp_path / "a", tmp_path / "rollouts", **settings)).train()
    (reader := vapo(model_dir, tmp_path / "b", tmp_path / "rollouts", **settings)).train()
    assert torch.equal(weights(writer.model), weights(reader.model))
    assert logged(writer, "reward") == logged(reader, "reward") and len(logged(reader, "reward")) == 2


# --- What is seen of it


class AsTensorBoard(TrainerCallback):
    def __init__(self):
        self.points: dict[str, list] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in logs:
            self.points.setdefault(name, []).append(state.global_step)


def test_writing_and_passes_have_bars_names_steps_and_tables_of_their_own(model_dir, tmp_path, capsys):
    settings = {"disable_tqdm": False, "log_completions": True, "logging_steps": 2, "critic_pretraining_epochs": 2}
    trainer = vapo(model_dir, tmp_path / "run", tmp_path / "rollouts", **settings)
    trainer.add_callback(seen := AsTensorBoard())
    trainer.pretrain_critic()
    out, err = capsys.readouterr()
    assert seen.points["critic_pretraining_rollouts/reward"] == [2, 4]
    assert seen.points["critic_pretraining_rollouts/completions/mean_length"] == [2, 4]
    assert seen.points["critic_pretraining/loss"] == [2, 3, 4, 6], "and at the end of a pass"
    for name in ("error", "explained_variance", "explained_variance_within_prompt"):
        assert seen.points[f"critic_pretraining/held_out_{name}"] == [3, 6], name
    assert logged(trainer, "critic_pretraining/pass") == [1, 2]
    tables = sorted(path.stem for path in (tmp_path / "run" / "completions").glob("*.parquet"))
    assert tables == ["critic_pretraining_rollouts_00002", "critic_pretraining_rollouts_00004"]
    assert "Rollouts for the critic: 100%" in err and "Critic pretraining: 100%" in err
    assert "rollouts: 4, 0 of which are there" in out
    assert "for up to 2 passes over stored rollouts, 3 each, which are 6 updates, 0 of which are done" in out
    assert "after 6 updates on 6 rollouts, the best on what is held out, with an error of" in out


# --- Options


BASE = {"bf16": False, "use_cpu": True, "report_to": [], "per_device_train_batch_size": 8}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (VAPOConfig, {"critic_pretraining_epochs": 4}, "`critic_pretraining_epochs=4` has no effect with"),
        (VAPOConfig, {"critic_pretraining_held_out": 0.2}, "`critic_pretraining_held_out=0.2` has no effect with"),
        (VAPOConfig, {"critic_pretraining_patience": 3}, "`critic_pretraining_patience=3` has no effect with"),
        (SPPOConfig, {"critic_pretraining_rollouts": "r"}, "`critic_pretraining_rollouts='r'` has no effect with"),
        (
            VAPOConfig,
            {"critic_pretraining_rollouts": "r", "critic_pretraining_loss_threshold": 0.1},
            "`critic_pretraining_loss_threshold=0.1` has no effect with `critic_pretraining_rollouts='r'`",
        ),
        (
            VAPOConfig,
            {"critic_pretraining_rollouts": "r", "critic_pretraining_held_out": 0.0, "critic_pretraining_patience": 1},
            "`critic_pretraining_patience=1` has no effect with `critic_pretraining_held_out=0.0`",
        ),
        (VAPOConfig, {"critic_pretraining_rollouts": "r", "critic_pretraining_held_out": 1.0}, r"in \[0, 1\)"),
        (
            GenACConfig,
            {"critic_pretraining_rollouts": "r", "critic_pretraining_steps": 4},
            "`critic_pretraining_rollouts='r'` has no use for a critic that writes its values",
        ),
    ],
)
def test_an_option_without_effect_is_refused(config, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), **BASE, **settings)


def test_one_prompt_cannot_be_learned_from_and_held_out(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(vapo_runs, "PROMPTS", ["ab"] * 8)
    with pytest.raises(ValueError, match="`critic_pretraining_held_out=0.25` of 1 prompts leaves none to learn from"):
        vapo(model_dir, tmp_path, tmp_path / "rollouts").pretrain_critic()


def test_the_command_that_pretrains_takes_them_too(model_dir, tmp_path, written):
    base = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--bf16", "false", "--use_cpu"]
    args = make_parser("vapo").parse_args_and_config(
        [*base, "--critic_pretraining_rollouts", "rollouts", "--critic_pretraining_patience", "3"]
    )[1]
    assert (args.critic_pretraining_rollouts, args.critic_pretraining_patience) == ("rollouts", 3)
    trainer = vapo(model_dir, tmp_path, written, trainer=pretrainer(VAPOTrainer), save_strategy="no")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer._generate_and_score = never
    trainer.train()
    assert (tmp_path / "critic" / "model.safetensors").is_file()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.state_dict().items())
