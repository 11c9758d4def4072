"""Runs of the command line that are killed again and again, in every phase, end as the run that never was."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from genac_runs import GENAC, fit_critic
from launch import run
from safetensors.torch import load_file
from test_critic_resume import same_tensors
from tiny import tiny_model_dir

from trl_credit.saved import MANIFEST, differences


pytestmark = pytest.mark.slow


# A user's module with a reward, which kills the process at the n-th time that something happens: a rollout is rewarded,
# an optimizer is about to step, a file is opened to be written, one is renamed, a critic is asked.
KILLER = """
import os, signal, sys
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trl_credit.critics.generative.critic import GenerativeCritic

what, name, left = os.environ["KILL_AT"].split(":")
left = int(left)

def happens(event, path=""):
    global left
    if event == what and path.endswith(name):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def audit(event, args):
    if event == "os.rename" or event == "open" and "w" in str(args[1]):
        happens(event, str(args[0]))

def asked(self, readings, ask=GenerativeCritic.ask):
    happens("answers")
    return ask(self, readings)

GenerativeCritic.ask = asked
sys.addaudithook(audit)
register_optimizer_step_pre_hook(lambda *_: happens("step"))

def variety(completion_ids, **kwargs):
    happens("rollout")
    return [len(set(ids)) / 8 for ids in completion_ids]
"""
NEVER = "nothing::0"
# Checkpoints after two and four updates of the pretraining, both `checkpoint-0`, then after two and four steps.
CONFIG = {
    "datasets": [{"path": "json", "data_files": "prompts.jsonl"}],
    "reward_funcs": ["killer.variety"],
    "critic_pretraining_steps": 4,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "critic_lr_scheduler_type": "linear",
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 8,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in ("ab", "c", "d e", "fgh")))
    return tmp_path


def train(method: str, folder: Path, out: str, monkeypatch, kill_at: str = NEVER, resume: bool = False, **options):
    monkeypatch.setenv("KILL_AT", kill_at)
    config = {**CONFIG, **options, "output_dir": out, "model_name_or_path": str(folder / "tiny-qwen2")}
    (folder / "config.json").write_text(json.dumps(config))  # which is YAML too
    # What `trl-credit` starts, without the process that waits for it.
    command = [sys.executable, "-m", "trl_credit.scripts.train", method, "--config", "config.json"]
    flags = ["--resume_from_checkpoint", "true"] if resume else []
    run([*command, *flags], cwd=folder, status=0 if kill_at == NEVER else -signal.SIGKILL)


def check_chain(method, kills, folder, monkeypatch, **options):
    tiny_model_dir(folder)
    train(method, folder, "whole", monkeypatch, **options)
    for number, (kill_at, checkpoint) in enumerate(kills):
        train(method, folder, "killed", monkeypatch, kill_at, resume=number > 0, **options)
        found = {path.name for path in (folder / "killed").glob("checkpoint-*") if differences(path) == []}
        assert found == {path.name for path in (folder / "killed").glob("checkpoint-*")}, "each is whole"
        assert max(found, default=None) == checkpoint, (kill_at, found)
    train(method, folder, "killed", monkeypatch, resume=True, **options)
    whole, killed = folder / "whole", folder / "killed"
    weights = ["model.safetensors", "critic/model.safetensors"]
    for name in [*weights, *(f"checkpoint-4/{name}" for name in weights)]:
        assert same_tensors(load_file(whole / name), load_file(killed / name)), name
    for name in ("critic_state.pt", "optimizer.pt", "scheduler.pt"):
        states = [torch.load(path / "checkpoint-4" / name, weights_only=True) for path in (whole, killed)]
        assert same_tensors(*states), name
    started = load_file(folder / "tiny-qwen2" / "model.safetensors")
    assert not same_tensors(started, load_file(killed / "model.safetensors"))
    assert (killed / "checkpoint-4" / MANIFEST).is_file() and not (killed / "_unfinished").exists()


# What happens when it dies, and the last checkpoint in its place then.
def test_vapo_killed_in_every_phase_ends_as_never_killed(folder, monkeypatch):
    kills = [
        ("rollout::3", "checkpoint-0"),  # of the pretraining
        ("step::1", "checkpoint-0"),  # an update of the pretraining
        ("open:critic/config.json:1", "checkpoint-0"),  # the second save of it
        ("os.rename:_unfinished/checkpoint-0:1", None),  # when the old one has been moved away
        ("step::4", "checkpoint-0"),  # an update of the policy
        ("open:trainer_state.json:1", "checkpoint-0"),
        ("os.rename:_unfinished/checkpoint-2:1", "checkpoint-0"),
        ("rollout::1", "checkpoint-2"),
    ]
    check_chain("vapo", kills, folder, monkeypatch)


def test_genac_killed_in_every_phase_ends_as_never_killed(folder, monkeypatch):
    kills = [
        ("answers::3", "checkpoint-0"),  # of the pretraining
        ("open:genac_state.json:1", "checkpoint-0"),
        ("answers::2", "checkpoint-0"),
        ("os.rename:_unfinished/checkpoint-2:1", "checkpoint-0"),
        ("step::1", "checkpoint-2"),
    ]
    critic = fit_critic(folder / "critic")
    check_chain("genac", kills, folder, monkeypatch, critic_model_name_or_path=critic, **GENAC)
