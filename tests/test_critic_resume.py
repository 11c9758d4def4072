"""A run that was killed and resumed is the run that was never killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sppo_runs import critic_dir
from tiny import tiny_model_dir

from trl_credit.saved import MANIFEST


pytestmark = pytest.mark.slow


# Real sampling, so that random numbers matter; λ, optimizer and schedule all have a state by the second step.
WORKER = """
import os, signal, sys
import torch
import sppo_runs, vapo_runs
from trl_credit import SPPOTrainer, VAPOTrainer

model, folder, kill_at, resume, kind = sys.argv[1:]
make_trainer = (sppo_runs if kind == "sppo" else vapo_runs).make_trainer

class Killed(SPPOTrainer if kind == "sppo" else VAPOTrainer):
    def update_critic(self, micro_batches, *args):
        if f"{self._pretraining['pretraining_steps']}+{self.state.global_step}" == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().update_critic(micro_batches, *args)

settings = {}
if kind == "lora":
    settings["critic_peft_config"] = {"r": 4, "target_modules": "all-linear"}
if kind == "sppo":  # a critic of another family
    settings = {"critic": f"{model}/critic", "reward_range": [0, 2]}
trainer = make_trainer(
    model, folder, trainer=Killed, rollout=None, save_strategy="steps", save_steps=2, max_steps=5, optim="adamw_torch",
    critic_pretraining_steps=5, critic_lr_scheduler_type="linear", critic_warmup_steps=2, num_generations=2,
    gradient_accumulation_steps=2, lr_scheduler_type="linear", logging_steps=1,
    reward=lambda completions, **kwargs: [len(set(c)) / 8 for c in completions], **settings,
)
trainer.train(resume_from_checkpoint=True if resume == "resume" else None)
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tiny_model_dir(tmp_path_factory.mktemp("model"))
    critic_dir(folder / "critic")
    return str(folder)


def run(model_dir, folder, kill_at="never", resume="fresh", kind="full"):
    result = subprocess.run(
        [sys.executable, "-c", WORKER, model_dir, str(folder), kill_at, resume, kind],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == (0 if kill_at == "never" else -signal.SIGKILL), result.stderr[-3000:]


@pytest.fixture(scope="module")
def never_killed(model_dir, tmp_path_factory):
    """The folder of a whole run of each kind."""
    folders = {}

    def get(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(f"never_killed_{kind}")
            run(model_dir, folders[kind], kind=kind)
        return folders[kind]

    return get


def same_tensors(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_tensors(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# Pretraining steps + optimizer steps that are done when it dies.
@pytest.mark.parametrize(
    ("kind", "kill_at"),
    [*((kind, kill_at) for kind in ("full", "lora") for kill_at in ("3+0", "5+1", "5+3")), ("sppo", "5+3")],
)
def test_killed_and_resumed_is_never_killed_to_the_bit(kind, kill_at, never_killed, model_dir, tmp_path):
    whole = never_killed(kind)
    run(model_dir, tmp_path, kill_at=kill_at, kind=kind)
    assert not (tmp_path / "checkpoint-5").exists()
    run(model_dir, tmp_path, resume="resume", kind=kind)
    a, b = whole / "checkpoint-5", tmp_path / "checkpoint-5"
    for weights in ("model.safetensors", f"critic/{'adapter_' * (kind == 'lora')}model.safetensors"):
        ours, theirs = load_file(a / weights), load_file(b / weights)
        assert same_tensors(ours, theirs), weights
    for state in ("critic_state.pt", "optimizer.pt", "scheduler.pt"):
        states = [torch.load(folder / state, weights_only=True) for folder in (a, b)]
        assert same_tensors(*states), state
    state = torch.load(a / "critic_state.pt", weights_only=True)
    assert state["steps"] == 10 and state["counters"] == {
        "head_waits": 0,
        "pretraining_steps": 5,
        "pretraining_rollouts": 5,
        "pretraining_done": 1,
    }
    assert state["optimizer"]["state"][0]["exp_avg"].abs().max() > 0
    # The same data, as far as the log can tell.
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (a, b)]
    last = [[entry for entry in log if entry.get("step") == 5][0] for log in logs]
    different = {name for name in last[0] if last[0][name] != last[1][name]}
    assert {name for name in different if "time" not in name} == set()


def test_a_policy_with_adapters_resumes_beside_a_critic_with_adapters(model_dir, tmp_path):
    """`Trainer` takes each folder with an adapter in it for one of the policy's."""
    from peft import LoraConfig
    from vapo_runs import make_trainer

    def trainer():
        lora = {"critic_peft_config": {"r": 4, "target_modules": "all-linear"}}
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "adamw_torch"}
        adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return make_trainer(model_dir, tmp_path, peft_config=adapters, **lora, **saving)

    (whole := trainer()).train()
    (resumed := trainer()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert list(resumed.model.peft_config) == ["default"]
    for one, other in ((resumed.model, whole.model), (resumed.critic, whole.critic)):
        weights = other.state_dict()
        assert all(torch.equal(p, weights[name]) for name, p in one.state_dict().items())


def test_a_checkpoint_without_the_critics_state_is_refused(model_dir, tmp_path):
    run(model_dir, tmp_path)
    for name in ("critic_state.pt", MANIFEST):
        (tmp_path / "checkpoint-4" / name).unlink()
    from vapo_runs import make_trainer

    trainer = make_trainer(model_dir, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="checkpoint-4 holds no state of the critic"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_critic_of_a_checkpoint_loads_anywhere(kind, never_killed):
    from transformers import AutoModelForTokenClassification

    saved = never_killed(kind) / "checkpoint-5" / "critic"
    critic = AutoModelForTokenClassification.from_pretrained(saved, num_labels=1)
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    heads = [weight for key, weight in load_file(saved / name).items() if key.endswith("score.weight")]
    assert len(heads) == 1 and torch.equal(critic.score.weight, heads[0]) and heads[0].abs().max() > 0
