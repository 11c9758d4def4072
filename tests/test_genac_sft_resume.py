"""The fit of GenAC's critic to its oracle's traces, ended by SIGKILL and resumed."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file


pytestmark = pytest.mark.slow


STEPS, SAVED, KILLED = 6, 4, 5
RUN = f"""
import os, signal, sys
from datasets import Dataset
from transformers import TrainerCallback
from trl_credit.scripts.genac_sft import CriticSFTTrainer, GenACSFTConfig

model, folder, how = sys.argv[1:]

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if how == "kill" and state.global_step == {KILLED}:
            os.kill(os.getpid(), signal.SIGKILL)

settings = dict(max_steps={STEPS}, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1)
args = GenACSFTConfig(folder, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, **settings)
texts = [str(number) for number in range(10)]
traces = Dataset.from_dict({{"prompt": texts, "completion": [text + " <score>5</score>" for text in texts]}})
trainer = CriticSFTTrainer(model=model, args=args, train_dataset=traces, callbacks=[Kill()])
trainer.train(resume_from_checkpoint=how == "resume")
trainer.save_model()
"""


def fit(model_dir, folder, how: str) -> int:
    command = [sys.executable, "-c", RUN, str(model_dir), str(folder), how]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode in (0, -signal.SIGKILL), result.stderr[-3000:]
    return result.returncode


def test_a_killed_fit_goes_on_to_the_bit(model_dir, tmp_path):
    assert fit(model_dir, tmp_path / "whole", "never") == 0
    assert fit(model_dir, tmp_path / "killed", "kill") == -signal.SIGKILL
    assert not (tmp_path / "killed" / f"checkpoint-{STEPS}").exists()
    assert fit(model_dir, tmp_path / "killed", "resume") == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    saved = load_file(tmp_path / "whole" / f"checkpoint-{SAVED}" / "model.safetensors")
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert not any(whole[name].equal(saved[name]) for name in whole if whole[name].dim() == 2 and "embed" not in name)
