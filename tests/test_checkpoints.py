"""A checkpoint is whole or absent, whatever ends the process that saves it, and refused by name if it is neither."""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_critic_resume import same_tensors
from vapo_runs import make_trainer

from trl_credit import VAPOTrainer
from trl_credit.saved import MANIFEST, differences, finish_moves
from trl_credit.seam.resuming import UNFINISHED_FOLDER


SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "trainer": VAPOTrainer}


@pytest.fixture(scope="module")
def checkpoints(model_dir, tmp_path_factory):
    """A run of two steps with a checkpoint after each. Not to be changed: see `copied`."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(model_dir, folder, max_steps=2, **SAVING).train()
    return folder


@pytest.fixture
def copied(checkpoints, tmp_path):
    return Path(shutil.copytree(checkpoints, tmp_path / "run"))


def resume(model_dir, checkpoint, **settings):
    trainer = make_trainer(model_dir, Path(checkpoint).parent / "resumed", max_steps=3, **{**SAVING, **settings})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


# --- Whole or absent


# C functions that files come and change by.
WRITES = {
    *("open", "write", "writelines", "flush", "close", "__exit__", "truncate"),
    *("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "sendfile", "copy_file_range"),
    *("write_record", "write_end_of_file", "serialize_file", "save"),
}


class PhotographedSaves(VAPOTrainer):
    """Copies the run's folder whenever a call in the second save has changed it: what a kill would leave behind."""

    photographs: Path

    def _save_checkpoint(self, model, trial):
        self.saves = self.__dict__.get("saves", 0) + 1
        run, seen = Path(self.args.output_dir), set()

        def after_call(frame, event, function):
            if event != "c_return" or function.__name__ not in WRITES:
                return
            files = frozenset((str(path), path.stat().st_size) for path in run.rglob("*") if path.is_file())
            if files not in seen:
                shutil.copytree(run, self.photographs / f"{len(seen):03d}")
                seen.add(files)

        sys.setprofile(after_call if self.saves == 2 else None)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            sys.setprofile(None)


def pretraining(model_dir, folder, trainer=VAPOTrainer):
    """Checkpoints after two, four and six updates, all of them `checkpoint-0`, then one step of the policy."""
    steps = {"critic_pretraining_steps": 6, "max_steps": 1, "save_steps": 2}
    return make_trainer(model_dir, folder, **{**SAVING, **steps, "trainer": trainer})


@pytest.mark.slow
def test_a_kill_at_any_file_of_a_save_leaves_the_old_checkpoint_or_the_new_one(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(PhotographedSaves, "photographs", tmp_path / "left", raising=False)
    whole = pretraining(model_dir, tmp_path / "whole", PhotographedSaves)
    whole.train()
    found = {}
    for run in sorted((tmp_path / "left").iterdir()):
        finish_moves(run / UNFINISHED_FOLDER, run)
        checkpoint = run / "checkpoint-0"
        assert (checkpoint / MANIFEST).is_file() and differences(checkpoint) == [], run
        state = torch.load(checkpoint / "critic_state.pt", weights_only=True)
        found.setdefault(state["counters"]["pretraining_steps"], []).append(run)
    assert [*found] == [2, 4] and len(found[2]) > 20, "every file of a save is a state of its own"
    for run in (found[2][-1], found[4][0]):
        resumed = pretraining(model_dir, run)
        resumed.train(resume_from_checkpoint=True)
        for one, other in ((resumed.model, whole.model), (resumed.critic, whole.critic)):
            assert same_tensors(one.state_dict(), other.state_dict()), run


def test_what_an_earlier_run_left_in_a_checkpoints_place_is_no_part_of_it(model_dir, tmp_path):
    left = tmp_path / "checkpoint-1" / "rollout_0_of_1.pt"
    left.parent.mkdir()
    left.touch()
    make_trainer(model_dir, tmp_path, **SAVING).train()
    assert not left.exists() and (left.parent / "trainer_state.json").is_file()
    assert not (tmp_path / UNFINISHED_FOLDER).exists()


class LittleRoom(VAPOTrainer):
    """The second save may write no file of more than so many bytes, as on a disk that is full."""

    room: int

    def save_training_state(self, folder):
        if self.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.RLIM_INFINITY))
        super().save_training_state(folder)


# No room for the critic's optimizer, for weights, for the manifest's list of files.
@pytest.mark.parametrize("room", [100_000, 20_000, 1_000])
@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_and_an_error_that_says_so(room, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(LittleRoom, "room", room, raising=False)
    trainer = make_trainer(model_dir, tmp_path, max_steps=2, **{**SAVING, "trainer": LittleRoom})
    try:
        with pytest.raises(OSError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/checkpoint-2 could not be saved (")
    assert f"{tmp_path}/checkpoint-1 is whole: resume from there" in message and "GiB are free" in message
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-1"]
    assert not (tmp_path / UNFINISHED_FOLDER).exists()
    again = make_trainer(model_dir, tmp_path, max_steps=2, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and (tmp_path / "checkpoint-2" / MANIFEST).is_file()


def test_checkpoints_beyond_the_limit_go_and_the_best_stays(model_dir, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 2, "load_best_model_at_end": True}
    prompts = make_trainer(model_dir, tmp_path).train_dataset
    trainer = make_trainer(
        model_dir,
        tmp_path,
        max_steps=4,
        metric_for_best_model="first",
        eval_dataset=prompts,
        **settings,
        **{**SAVING, "trainer": FirstIsBest},
    )
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


class FirstIsBest(VAPOTrainer):
    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_first": -self.state.global_step}


# --- What belongs together


@pytest.mark.parametrize("name", ["critic/model.safetensors", "critic_state.pt", "model.safetensors", "optimizer.pt"])
def test_a_file_of_another_checkpoint_is_refused_by_name(name, copied, model_dir):
    shutil.copy(copied / "checkpoint-1" / name, copied / "checkpoint-2" / name)
    with pytest.raises(ValueError) as caught:
        resume(model_dir, copied / "checkpoint-2")
    assert f"checkpoint-2 is not whole: {name} is not the file that was saved with the others" in str(caught.value)
    assert f"Resume from another checkpoint ({copied}/checkpoint-1)" in str(caught.value)


@pytest.mark.parametrize("name", ["critic/config.json", "critic_state.pt", "trainer_state.json"])
def test_a_missing_file_is_refused_by_name(name, copied, model_dir):
    (copied / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-2 is not whole: {name}.* is missing"):
        resume(model_dir, copied / "checkpoint-2")


def test_all_files_are_listed_but_the_list(checkpoints):
    for checkpoint in checkpoints.glob("checkpoint-*"):
        files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
        assert set(json.loads((checkpoint / MANIFEST).read_text())["sha256"]) == files - {MANIFEST}


# --- Which checkpoint


@pytest.mark.parametrize("asked", ["true", "True", True])
def test_true_is_the_last_checkpoint_also_as_a_text_of_the_command_line(asked, copied, model_dir):
    trainer = make_trainer(model_dir, copied, max_steps=3, **SAVING)
    trainer.train(resume_from_checkpoint=asked)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    assert not (copied / "checkpoint-3" / "rollout_0_of_1.pt").exists() and trainer.engine.steps == 3


def test_a_checkpoint_that_is_not_there_is_refused_by_name(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path / "new", **SAVING)
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint='.*checkpoint-7'` is no folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    with pytest.raises(ValueError, match="goes on from the last checkpoint of `output_dir`, and .*new has none"):
        trainer.train(resume_from_checkpoint="true")
