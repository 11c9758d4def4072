"""What a new trainer gets from its base without saying anything, and what it must declare."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from vine_runs import PROMPTS, SETTINGS, fixed_rollout, share_of_even

from trl_credit import GenACTrainer, GRPOLambdaTrainer, SPPOTrainer, VAPOTrainer
from trl_credit.seam import CreditConfig, CreditTrainer
from trl_credit.seam.rollout_keys import declared_keys


OURS = ("vine_continuations", "segment_min_length", "segment_target_length", "segment_max_length")
COMMON = {name: value for name, value in SETTINGS.items() if name not in OURS} | {"num_generations": 1}


class TokenCredit(CreditTrainer):
    """A method that says nothing but what the advantages are: another one for each token."""

    config_class = CreditConfig
    _name = "token-credit"

    def assign_credit(self, rollout, rewards, mode):
        ids = rollout["completion_ids"]
        advantages = torch.where(self.trained_tokens(rollout), ids % 7 - 3.0, 0)
        self.__dict__.setdefault("rollouts_seen", []).append((ids, rollout["completion_mask"], advantages))
        return {**rollout, "advantages": advantages}


def make(model_dir, folder, trainer=TokenCredit, rollout=fixed_rollout, **settings):
    callbacks = settings.pop("callbacks", None)
    return trainer(
        str(model_dir),
        share_of_even,
        CreditConfig(str(folder), **{**COMMON, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        rollout_func=rollout,
        callbacks=callbacks,
    )


# --- The exact token mean, and one completion a prompt


def test_two_micro_batches_of_unequal_lengths_have_the_loss_and_gradient_of_one_batch(model_dir, tmp_path):
    found = []
    for folder, size, number in (("one", 8, 1), ("two", 4, 2), ("eight", 1, 8)):
        trainer = make(
            model_dir, tmp_path / folder, per_device_train_batch_size=size, gradient_accumulation_steps=number
        )
        trainer.train()
        found.append((trainer.state.log_history[0], trainer.model.state_dict()))
    _, mask, advantages = trainer.rollouts_seen[0]
    assert len(set(mask.sum(1).tolist())) > 3
    (one, weights), *others = found
    assert one["loss"] == pytest.approx(-(advantages.double().sum() / mask.sum()).item(), abs=1e-6)
    for log, other in others:
        assert log["loss"] == pytest.approx(one["loss"], abs=1e-6)
        assert log["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert max((weights[name] - other[name]).abs().max() for name in weights) < 1e-6


def test_two_steps_of_a_rollout_are_means_each_over_its_own_tokens(model_dir, tmp_path):
    trainer = make(
        model_dir,
        tmp_path,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        gradient_accumulation_steps=1,
        max_steps=2,
        learning_rate=0.0,
    )
    seen = []
    before = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append((inputs["advantages"].double().sum() / inputs["completion_mask"].sum()).item())
        return before(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([-mean for mean in seen], abs=1e-6) and len(set(seen)) == 2


def test_one_completion_a_prompt_trains_and_evaluates_with_the_base_alone(model_dir, tmp_path):
    config = CreditConfig(str(tmp_path), **COMMON)
    assert config.num_generations == 1 and type(config.num_generations) is int
    trainer = make(model_dir, tmp_path, rollout=None, max_steps=2, learning_rate=0.1)
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2
    assert any(not weight.equal(weights[name]) for name, weight in trainer.model.state_dict().items())
    rows = [row["prompt"] for row in trainer.rollout_rows]
    assert len(set(rows)) == len(rows) == 4


# --- A run without training


class Watching(TrainerCallback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, *args, **kwargs):
        self.events.append("begin")

    def on_step_end(self, *args, **kwargs):
        self.events.append("step")

    def on_train_end(self, *args, **kwargs):
        self.events.append("end")


class Begins(TokenCredit):
    def begin_training(self, checkpoint):
        self.__dict__.setdefault("begun", []).append(checkpoint)

    def save_training_state(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ours").write_text(str(len(self.begun)))


def test_a_run_without_training_begins_and_ends_like_one_and_steps_never(model_dir, tmp_path):
    watching = Watching()
    trainer = make(model_dir, tmp_path, Begins, callbacks=[watching], max_steps=3)
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.run_without_training()
    assert trainer.begun == [None]
    assert watching.events == ["begin", "end"]
    assert trainer.state.global_step == 0 and not hasattr(trainer, "rollouts_seen")
    assert not trainer.is_in_train
    assert all(weight.equal(weights[name]) for name, weight in trainer.model.state_dict().items())
    # And the same trainer trains afterwards.
    trainer.train()
    assert watching.events == ["begin", "end", "begin", "step", "step", "step", "end"]
    assert trainer.state.global_step == 3 and trainer.begun == [None, None]


def test_a_run_without_training_resumes_where_a_run_was(model_dir, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    make(model_dir, tmp_path, Begins, **settings).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer = make(model_dir, tmp_path, Begins, **settings)
    trainer.run_without_training(checkpoint)
    assert trainer.begun == [checkpoint]
    assert trainer.state.global_step == 2 and not hasattr(trainer, "rollouts_seen")


# --- Keys of a rollout


class Adding(TokenCredit):
    rollout_keys = {"marks": "(B, T)", "names": "[B]"}
    added: dict = {}

    def assign_credit(self, rollout, rewards, mode):
        batch, tokens = rollout["completion_ids"].shape
        sizes = {"B": batch, "T": tokens}
        made = {name: make_value(sizes) for name, make_value in self.added.items()}
        return {**super().assign_credit(rollout, rewards, mode), **made}


class AddingMore(Adding):
    rollout_keys = {"prompts": "(B, P)", "total": "()"}


def test_declared_keys_of_all_bases_are_taken_and_travel_with_the_rows(model_dir, tmp_path):
    trainer = make(model_dir, tmp_path, AddingMore, rollout=None)
    trainer.added = {
        "marks": lambda size: torch.ones(size["B"], size["T"]),
        "names": lambda size: [f"row {i}" for i in range(size["B"])],
        "prompts": lambda size: torch.zeros(size["B"], 5),
        "total": lambda size: torch.tensor(3.0),
    }
    trainer.train()
    assert declared_keys(AddingMore) == {**Adding.rollout_keys, **AddingMore.rollout_keys}


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"extra": lambda size: torch.zeros(size["B"], 2)}, r"Adding.assign_credit added 'extra' .*shape \(4, 2\)"),
        (
            {"marks": lambda size: torch.zeros(size["B"])},
            r"'marks' of shape \(4,\), and declared is \(B, T\) with B = 4",
        ),
        ({"marks": lambda size: torch.zeros(size["B"], size["T"] + 1)}, r"declared is \(B, T\) with B = 4 .* T = 12"),
        ({"marks": lambda size: [0] * size["B"]}, r"'marks' of shape \[4\]"),
        ({"names": lambda size: ["a"]}, r"'names' of shape \[1\], and declared is \[B\]"),
        ({"names": lambda size: 3}, r"'names' of shape int"),
        (
            {"advantages": lambda size: torch.zeros(size["B"], 1)},
            r"'advantages' of shape \(4, 1\), .*\(B,\) or \(B, T\)",
        ),
    ],
)
def test_a_key_that_is_not_declared_or_has_another_shape_is_an_error_that_names_it(model_dir, tmp_path, added, message):
    trainer = make(model_dir, tmp_path, Adding)
    trainer.added = added
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_the_four_trainers_declare_what_they_add():
    assert declared_keys(GRPOLambdaTrainer) == {}
    own_prompts = {"critic_prompt_ids", "critic_prompt_mask"}  # of a critic that is told more than the policy
    assert set(declared_keys(VAPOTrainer)) == {"values", "returns", "critic_mask", "positive", *own_prompts}
    assert set(declared_keys(SPPOTrainer)) == {"values", "critic_prompts", "critic_targets"}
    assert declared_keys(GenACTrainer) == {"readings": "[B]"}


# --- What is divided by what, and what is saved before what


def test_completions_that_are_masked_as_truncated_are_not_in_what_the_loss_is_divided_by(model_dir, tmp_path):
    trainer = make(model_dir, tmp_path, mask_truncated_completions=True, per_device_train_batch_size=8)
    trainer.train()
    ((ids, mask, advantages),) = trainer.rollouts_seen
    tokens = mask.sum(1)
    assert (tokens == 0).any() and (tokens > 0).any() and not advantages[tokens == 0].any()
    expected = -advantages.double().sum() / tokens.sum()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert (ids[tokens == 0] != trainer.processing_class.pad_token_id).any(), "there were tokens to be counted"


class Saves(TokenCredit):
    """Sees what is there already when it is to save its own."""

    folders_of_networks = ("other",)

    def save_networks(self, folder):
        self.__dict__.setdefault("found", []).append(("networks", sorted(path.name for path in folder.glob("*"))))
        (folder / "other").mkdir(parents=True)

    def save_training_state(self, folder):
        self.__dict__.setdefault("found", []).append(("state", sorted(path.name for path in folder.glob("*"))))

    def push_to_hub(self, *args, **kwargs):
        self.found.append(("push", sorted(path.name for path in (self.pushed_from / "").glob("*"))))


def test_a_checkpoint_is_complete_and_a_model_pushed_when_all_networks_are_in_it(model_dir, tmp_path):
    """`trainer_state.json` is by what `Trainer` tells that a checkpoint is complete: a kill before it costs nothing."""
    trainer = make(model_dir, tmp_path, Saves, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.found == [("state", []), ("networks", [])]
    assert {"other", "trainer_state.json", "model.safetensors"} <= {
        p.name for p in (tmp_path / "checkpoint-1").iterdir()
    }
    trainer.args.push_to_hub, trainer.pushed_from = True, tmp_path / "published"
    trainer.save_model(str(tmp_path / "published"))
    (networks, found), (push, pushed) = trainer.found[2:]
    assert (networks, found, push) == ("networks", [], "push") and {"other", "model.safetensors"} <= set(pushed)


def test_a_mean_that_is_logged_is_over_all_micro_batches_since_the_last_log(model_dir, tmp_path):
    trainer = make(model_dir, tmp_path)
    trainer.model.train()
    trainer.log_means("train", {"a": (torch.tensor(3.0), 2), "b": (torch.tensor(1.0), 0)})
    trainer.log_means("train", {"a": (torch.tensor(9.0), torch.tensor(4))})
    trainer.log({})
    trainer.log_means("train", {"a": (torch.tensor(1.0), 1)})
    trainer.log({})
    first, second = trainer.state.log_history
    assert (first["a"], second["a"]) == (2.0, 1.0) and "b" not in first


def test_an_engine_of_vllm_beside_the_policys_is_set_as_the_policys_is(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_credit.seam.trainer.VLLMGeneration", dict)
    settings = {"vllm_server_timeout": 7.0, "vllm_tensor_parallel_size": 2, "vllm_model_impl": "transformers"}
    for trusts in (False, True):
        trainer = make(model_dir, tmp_path, trust_remote_code=trusts, vllm_enable_sleep_mode=trusts, **settings)
        asked = trainer.vllm_beside(trainer.model, trainer.processing_class, temperature=0.5)
        assert asked["trust_remote_code"] is trusts and asked["enable_sleep_mode"] is trusts
        assert (asked["server_timeout"], asked["tensor_parallel_size"]) == (7.0, 2)
        assert (asked["model_impl"], asked["temperature"]) == ("transformers", 0.5)
        assert asked["model"] is trainer.model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_though_its_gradient_is_one(value, model_dir, tmp_path):
    class Broken(TokenCredit):
        def extra_loss(self, terms, inputs, mode):
            return torch.tensor(value)

    with pytest.raises(FloatingPointError, match=f"The loss of step 0 is {value}"):
        make(model_dir, tmp_path, Broken).train()


class Reading(TokenCredit):
    """Keeps the prompts of its rollouts."""

    def assign_credit(self, rollout, rewards, mode):
        self.__dict__.setdefault("prompts", []).append([row["prompt"] for row in self.rollout_rows])
        return super().assign_credit(rollout, rewards, mode)


def test_a_run_that_is_resumed_in_a_later_epoch_reads_the_prompts_that_were_next(model_dir, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "per_device_train_batch_size": 4}
    (whole := make(model_dir, tmp_path, Reading, **settings)).train()
    per_epoch = len(PROMPTS) // len(whole.prompts[0])
    assert len(whole.prompts) == 6 and per_epoch == 2
    epochs = [sum(whole.prompts[at : at + 2], []) for at in (0, 2, 4)]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    for step in (3, 4, 5):
        resumed = make(model_dir, tmp_path, Reading, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.prompts == whole.prompts[step:]
