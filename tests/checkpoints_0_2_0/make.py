"""
How the checkpoints in this folder were made: `python tests/checkpoints_0_2_0/make.py`, with version 0.2.0 checked out.

Each archive holds the models that a run of four steps started from (`start/`) and its checkpoint of step 2.
`expected.json` holds what the run logged for the steps after it and what it trained; that a resumed run does the same
to the bit is asserted here. Later versions resume these checkpoints (`tests/test_old_checkpoints.py`): do not make them
anew.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from safetensors.torch import load_file
from vapo_runs import PROMPTS, fixed_rollout

from trl_credit import GenACConfig, GenACTrainer, SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer


HERE = Path(__file__).parent
SETTINGS = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "max_completion_length": 12,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "adam_epsilon": 1e-2,  # does not turn the rounding of a small gradient into a full step
    "critic_learning_rate": 1e-2,
    "critic_lr_scheduler_type": "linear",
    "critic_warmup_steps": 2,
    "critic_pretraining_steps": 2,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "logging_steps": 1,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
SEGMENTS = {"segment_min_length": 1, "segment_target_length": 3, "segment_max_length": 5}
TEMPLATE = "{success_rate} {problem}: {partial_solution} ="
RUNS = {
    "vapo": (
        VAPOTrainer,
        VAPOConfig,
        {"length_adaptive_alpha": 1.5, "whiten_advantages": True, "positive_reward_threshold": 0.5},
    ),
    "sppo": (SPPOTrainer, SPPOConfig, {}),
    "genac": (
        GenACTrainer,
        GenACConfig,
        {"critic_template": TEMPLATE, "critic_max_completion_length": 20, **SEGMENTS},
    ),
}
NUMBERS = ("loss", "grad_norm", "reward", "critic/loss", "critic/grad_norm", "critic/learning_rate")


def share_of_even(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make_trainer(name: str, start: Path, folder: Path):
    """A run as it was when its checkpoint was made. Completions are fixed; what GenAC's critic answers is sampled."""
    trainer_class, config_class, settings = RUNS[name]
    critic = start / "critic"
    return trainer_class(
        model=str(start / "policy"),
        reward_funcs=share_of_even,
        args=config_class(str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        rollout_func=fixed_rollout,
        critic=str(critic) if critic.exists() else None,
    )


def moved(start: Path, folder: Path) -> float:
    """How far training moved the weights of a network."""
    before, after = load_file(start / "model.safetensors"), load_file(folder / "model.safetensors")
    both = [after[name] - weight for name, weight in before.items() if name in after]
    return sum(x.double().square().sum().item() for x in both) ** 0.5


def results(trainer, start: Path, folder: Path) -> dict:
    """What a run logged after step 2, and what it trained, once it has ended."""
    trainer.save_model(str(folder))
    first = start / "critic" if (start / "critic").exists() else start / "policy"  # VAPO's starts as the policy
    networks = {"policy": (start / "policy", folder), "critic": (first, folder / "critic")}
    return {
        "steps": [
            {name: entry[name] for name in ("step", *NUMBERS)}
            for entry in trainer.state.log_history
            if "loss" in entry and entry["step"] > 2
        ],
        "critic_updates": trainer.engine.steps,
        "moved": {name: moved(*folders) for name, folders in networks.items()},
        "sha256": {name: digest(trained) for name, (_, trained) in networks.items()},
    }


def digest(folder: Path) -> str:
    weights = sorted(load_file(folder / "model.safetensors").items())
    return hashlib.sha256(b"".join(name.encode() + weight.numpy().tobytes() for name, weight in weights)).hexdigest()


def save_start(name: str, start: Path) -> None:
    from genac_runs import fit_critic
    from sppo_runs import critic_dir
    from tiny import tiny_model_dir

    tiny_model_dir(start, hidden=8, layers=1).rename(start / "policy")
    if name == "sppo":
        critic_dir(start / "critic")
    if name == "genac":
        fit_critic(start / "critic", hidden=8)


def pack(archive: Path, *folders: Path) -> None:
    """Without times and names of this machine."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for file in sorted(file for folder in folders for file in folder.rglob("*") if file.is_file()):
            entry = tarfile.TarInfo(str(file))
            entry.size = file.stat().st_size
            tar.addfile(entry, io.BytesIO(file.read_bytes()))


def main() -> None:
    torch.set_num_threads(1)
    expected = {}
    for name in RUNS:
        with TemporaryDirectory() as folder:
            os.chdir(folder)  # so that no path of this machine is in a file
            start, checkpoint = Path("start"), Path("checkpoint-2")
            save_start(name, start)
            whole = make_trainer(name, start, Path("whole"))
            whole.train()
            expected[name] = results(whole, start, Path("trained"))
            (Path("whole") / checkpoint).rename(checkpoint)
            resumed = make_trainer(name, start, Path("resumed"))
            resumed.train(resume_from_checkpoint=str(checkpoint))
            assert results(resumed, start, Path("trained_too")) == expected[name]
            pack(HERE / f"{name}.tar.xz", start, checkpoint)
            os.chdir(HERE)
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
