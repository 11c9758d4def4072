"""Every line of the table of bad input in the docs that is VAPO's: what was given, what is allowed, where."""

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_model, tiny_model_dir
from transformers import AutoModelForTokenClassification
from vapo_runs import make_trainer

from trl_credit import VAPOConfig


BASE = {"bf16": False, "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4, "num_generations": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.1}, r"`gamma` must be a number in \[0, 1\], got 1.1"),
        ({"critic_lambda": -0.1}, r"`critic_lambda` must be a number in \[0, 1\], got -0.1"),
        ({"policy_lambda": 2.0}, r"`policy_lambda` must be a number in \[0, 1\], got 2.0"),
        ({"policy_lambda": "adaptive"}, r"one of \('length_adaptive', 'relative_position'\), got 'adaptive'"),
        ({"relative_position_weight": 3}, r"`relative_position_weight` must be a number in \[0, 1\], got 3"),
        ({"length_adaptive_alpha": 0}, "`length_adaptive_alpha` must be positive, got 0"),
        ({"critic_clip_range": 0.0}, "`critic_clip_range` must be positive, or None for no clip, got 0.0"),
        ({"positive_lm_coef": -1.0}, "`positive_lm_coef` must be at least 0, got -1.0"),
        ({"truncation": "drop"}, "`truncation` must be 'terminal' or 'bootstrap', got 'drop'"),
        ({"loss_type": "vespo"}, "`loss_type='vespo'` has no per-token advantage"),
        ({"scale_rewards": "group"}, "`scale_rewards='group'` has no effect"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "`multi_objective_aggregation=.* has no effect"),
        ({"importance_sampling_level": "sequence"}, "`importance_sampling_level='sequence'` gives a completion one"),
        ({"critic_learning_rate": -1.0}, "`critic_learning_rate` must be a finite number of at least 0, got -1.0"),
        ({"critic_updates_per_step": 0}, "`critic_updates_per_step` must be a whole number of at least 1, got 0"),
        ({"critic_pretraining_steps": -1}, "`critic_pretraining_steps` must be a whole number of at least 0, got -1"),
        ({"critic_initial_value": float("nan")}, "`critic_initial_value` must be finite, got nan"),
        ({"num_generations": 0}, "`num_generations` must be at least 1, got 0"),
        ({"num_generations": 3}, r"generation_batch_size \(4\) must be divisible by num_generations \(3\)"),
        (
            {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
            r"`gradient_accumulation_steps` \(2\) must divide `steps_per_generation` \(1\)",
        ),
        (
            {"critic_pretraining_steps": 0, "critic_pretraining_loss_threshold": 0.1},
            "`critic_pretraining_loss_threshold=0.1` has no effect with `critic_pretraining_steps=0`",
        ),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VAPOConfig(str(tmp_path), **{**BASE, **settings})


@pytest.mark.parametrize("value", ["0.9", 0.9])
def test_a_number_for_lambda_may_come_as_text_from_the_command_line(value, tmp_path):
    assert VAPOConfig(str(tmp_path), policy_lambda=value, **BASE).policy_lambda == 0.9


def test_the_config_of_another_trainer_is_refused(model_dir, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig

    from trl_credit import VAPOTrainer

    with pytest.raises(TypeError, match="VAPOTrainer needs `args` to be a VAPOConfig, got GRPOConfig"):
        VAPOTrainer(
            str(model_dir),
            lambda **kwargs: [],
            GRPOConfig(str(tmp_path), bf16=False, use_cpu=True),
            train_dataset=Dataset.from_dict({"prompt": ["a"]}),
        )


def test_a_critic_that_is_given_twice_or_cannot_be_one_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="The critic is given twice"):
        make_trainer(model_dir, tmp_path, critic=model_dir, critic_model_name_or_path=str(model_dir))
    two_labels = AutoModelForTokenClassification.from_pretrained(model_dir, num_labels=2)
    with pytest.raises(ValueError, match="A critic must have one label, but Qwen2ForTokenClassification has 2"):
        make_trainer(model_dir, tmp_path, critic=two_labels)
    with pytest.raises(
        ValueError, match="`critic_model_init_kwargs=.* has no effect on a critic that is already a model"
    ):
        make_trainer(model_dir, tmp_path, critic=tiny_model(), critic_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(OSError, match="no-such-critic"):
        make_trainer(model_dir, tmp_path, critic=str(tmp_path / "no-such-critic"))


def test_a_peft_config_in_the_config_must_be_a_dict(tmp_path):
    with pytest.raises(TypeError, match="`critic_peft_config` must be a dict, got LoraConfig. Pass a `PeftConfig`"):
        VAPOConfig(str(tmp_path), critic_peft_config=LoraConfig(r=4), **BASE)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, **kwargs: [float("inf")] * len(completions), "returned inf for completion 0"),
        (lambda completions, **kwargs: [[0.5]] * len(completions), r"returned 1 rewards for the tokens of completion"),
        (lambda completions, **kwargs: ["good"] * len(completions), r"returned 'good' \(str\) for completion 0"),
        (lambda completions, **kwargs: [1.0], r"returned 1 rewards, but 4 were expected"),
    ],
)
def test_a_reward_that_is_none_is_refused_by_name(reward, message, model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, reward)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.train()


def test_images_are_refused_by_name():
    from trl_credit.networks.token_critic import refuse_images

    with pytest.raises(ValueError, match=r"\['pixel_values'\], which the critic cannot take"):
        refuse_images({"prompt_ids": torch.ones(1, 1), "pixel_values": torch.ones(1)})
