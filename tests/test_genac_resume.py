"""A run of GenAC that was killed and resumed is the run that was never killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from genac_runs import fit_critic
from safetensors.torch import load_file
from test_critic_resume import same_tensors
from tiny import tiny_model_dir

from trl_credit.saved import MANIFEST


pytestmark = pytest.mark.slow


# Real sampling of policy and critic, so that random numbers matter; hint, stand-in value, validation, optimizer and
# schedule all have a state by the second step.
WORKER = """
import os, signal, sys
from datasets import Dataset
from genac_runs import make_trainer
from trl_credit import GenACTrainer

model, critic, folder, kill_at, resume, kind = sys.argv[1:]

class Killed(GenACTrainer):
    def update_critic(self, micro_batches, *args):
        if f"{self._pretraining['pretraining_steps']}+{self.state.global_step}" == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().update_critic(micro_batches, *args)

settings = {}
if kind == "lora":
    settings["critic_peft_config"] = {"r": 4, "target_modules": "all-linear"}
trainer = make_trainer(
    model, folder, trainer=Killed, rollout=None, critic=critic, save_strategy="steps", save_steps=2, max_steps=5,
    optim="adamw_torch", critic_pretraining_steps=5, critic_pretraining_patience=9, critic_validation_steps=2,
    critic_lr_scheduler_type="linear", critic_warmup_steps=2, num_generations=2, gradient_accumulation_steps=2,
    lr_scheduler_type="linear", eval_dataset=Dataset.from_dict({"prompt": ["ab", "q"]}),
    per_device_eval_batch_size=2, critic_packing=kind == "lora", **settings,
)
trainer.train(resume_from_checkpoint=True if resume == "resume" else None)
"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return str(tiny_model_dir(folder)), fit_critic(folder / "critic")


def run(networks, folder, kill_at="never", resume="fresh", kind="full"):
    result = subprocess.run(
        [sys.executable, "-c", WORKER, *networks, str(folder), kill_at, resume, kind],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == (0 if kill_at == "never" else -signal.SIGKILL), result.stderr[-3000:]


@pytest.fixture(scope="module", params=["full", "lora"])
def never_killed(request, networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("never_killed")
    run(networks, folder, kind=request.param)
    return request.param, folder


# Pretraining steps + optimizer steps that are done when it dies.
@pytest.mark.parametrize("kill_at", ["3+0", "5+3"])
def test_killed_and_resumed_is_never_killed_to_the_bit(kill_at, never_killed, networks, tmp_path):
    kind, whole = never_killed
    run(networks, tmp_path, kill_at=kill_at, kind=kind)
    assert not (tmp_path / "checkpoint-5").exists()
    run(networks, tmp_path, resume="resume", kind=kind)
    a, b = whole / "checkpoint-5", tmp_path / "checkpoint-5"
    for weights in ("model.safetensors", f"critic/{'adapter_' * (kind == 'lora')}model.safetensors"):
        assert same_tensors(load_file(a / weights), load_file(b / weights)), weights
    for state in ("critic_state.pt", "optimizer.pt", "scheduler.pt"):
        assert same_tensors(*(torch.load(folder / state, weights_only=True) for folder in (a, b))), state
    state = torch.load(a / "critic_state.pt", weights_only=True)
    assert state["steps"] == 10 and state["counters"]["pretraining_done"] == 1
    ours, theirs = (json.loads((folder / "genac_state.json").read_text()) for folder in (a, b))
    assert ours == theirs
    assert ours["success_rate"][1] == pytest.approx(1 - 0.9**10), "one update of the hint a rollout"
    assert ours["validation"]["next"] == 7 and 0 < ours["validation"]["lowest"] < 1
    # The same data, as far as the log can tell.
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (a, b)]
    last = [[entry for entry in log if entry.get("step") == 5][0] for log in logs]
    different = {name for name in last[0] if last[0][name] != last[1][name]}
    assert {"critic/hint", "critic_pretraining/hint"} & set(last[0]) and {
        name for name in different if "time" not in name
    } == set()


def test_the_critic_of_a_checkpoint_loads_anywhere(never_killed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, folder = never_killed
    saved = folder / "checkpoint-5" / "critic"
    critic = AutoModelForCausalLM.from_pretrained(saved)
    state = dict(critic.named_parameters())
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    stored = load_file(saved / name)
    assert len(stored) > 10 and len(AutoTokenizer.from_pretrained(saved)) == 259
    if kind == "full":
        assert all(torch.equal(state[key], weight) for key, weight in stored.items())
    else:
        assert any("lora_B" in key and weight.abs().max() > 0 for key, weight in stored.items())
    card = (saved / "README.md").read_text()
    assert ("AutoPeftModelForCausalLM" if kind == "lora" else "AutoModelForCausalLM") in card


def test_a_checkpoint_without_genacs_state_is_refused(never_killed, networks, tmp_path):
    from genac_runs import make_trainer

    kind, folder = never_killed
    checkpoint = shutil.copytree(folder / "checkpoint-5", tmp_path / "checkpoint-5")
    for name in ("genac_state.json", MANIFEST):
        (checkpoint / name).unlink()
    trainer = make_trainer(networks[0], tmp_path / "other", critic=networks[1])
    with pytest.raises(FileNotFoundError, match="checkpoint-5 holds no genac_state.json"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
