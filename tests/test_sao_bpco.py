"""SAO and BPCO are VAPO with these parts, and nothing else."""

from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from vapo_runs import PROMPTS, SETTINGS

from trl_credit import BPCOConfig, BPCOTrainer, SAOConfig, SAOTrainer, VAPOConfig, VAPOTrainer


BASE = {"bf16": False, "use_cpu": True, "report_to": []}
PARTS = {
    SAOConfig: {
        "num_generations": 1,
        "trust_region": "dis",
        "epsilon": 0.3,
        "epsilon_high": 5.0,
        "length_adaptive_alpha": 1.5,
        "critic_freeze": ["attention"],
        "critic_learning_rate": 5e-6,
        "critic_updates_per_step": 2,
        "positive_lm_coef": 0.0,
    },
    BPCOConfig: {
        "num_generations": 1,
        "trust_region": "dppo_tv",
        "reward_range": "running",
        "critic_loss": "bce",
        "positive_lm_coef": 0.0,
    },
}


@pytest.mark.parametrize("config", PARTS)
def test_its_defaults_are_vapos_but_for_its_parts(config, tmp_path):
    with_parts = VAPOConfig(str(tmp_path), **{**BASE, **PARTS[config]})
    own = config(str(tmp_path), **BASE)
    for option in fields(VAPOConfig):
        assert getattr(own, option.name) == getattr(with_parts, option.name), option.name
    assert own.trust_region != "clip"


def right(completion_ids, **kwargs):
    return [float(len(ids) % 2) for ids in completion_ids]


def trained(trainer_class, config, model_dir, folder, **settings):
    trainer = trainer_class(
        model=str(model_dir),
        reward_funcs=right,
        args=config(str(folder), **{**SETTINGS, "steps_per_generation": 2, "max_steps": 2, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "solution": [prompt[::-1] for prompt in PROMPTS]}),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("trainer_class", "config"), [(SAOTrainer, SAOConfig), (BPCOTrainer, BPCOConfig)])
@pytest.mark.slow
def test_a_run_is_vapos_with_these_parts_bit_for_bit(trainer_class, config, model_dir, tmp_path):
    settings = {"critic_prompt_template": "{prompt} ({solution})"} if config is BPCOConfig else {}
    ours = trained(trainer_class, config, model_dir, tmp_path / "own", **settings)
    parts = {name: value for name, value in PARTS[config].items() if name not in SETTINGS} | settings
    vapos = trained(VAPOTrainer, VAPOConfig, model_dir, tmp_path / "vapo", **parts)
    for network in ("model", "critic"):
        one, other = (getattr(trainer, network).state_dict() for trainer in (ours, vapos))
        assert all(torch.equal(one[name], other[name]) for name in other)
    steps = [entry for entry in ours.state.log_history if "loss" in entry]
    assert steps[1]["trust_region/ratio_mean"] != 1  # the second step on a rollout is off-policy
    assert ours.engine.steps == 2 * ours.args.critic_updates_per_step
