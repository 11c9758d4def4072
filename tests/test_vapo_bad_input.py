"""What VAPO refuses: the table of its page in the docs, and what a config alone cannot know."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_model
from transformers import AutoModelForTokenClassification
from vapo_runs import make_trainer

from trl_credit import VAPOConfig


BASE = {"bf16": False, "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4, "num_generations": 1}


def table() -> list[tuple[str, str]]:
    """Settings and messages of the table in the docs."""
    section = (Path(__file__).parents[1] / "docs/trainers/vapo.md").read_text(encoding="utf-8").split("## Bad input")[1]
    return re.findall(r"^\| `(\w+=.*?)` \| (.*) \|$", section, flags=re.MULTILINE)


@pytest.mark.parametrize(("settings", "message"), table())
def test_a_config_that_cannot_be_meant_is_refused_as_the_docs_say(settings, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        VAPOConfig(str(tmp_path), **{**BASE, **eval(f"dict({settings})")})
    assert message in str(caught.value)


def test_the_table_is_read():
    assert len(table()) == 27


@pytest.mark.parametrize("value", ["0.9", 0.9])
def test_a_number_for_lambda_may_come_as_text_from_the_command_line(value, tmp_path):
    assert VAPOConfig(str(tmp_path), policy_lambda=value, **BASE).policy_lambda == 0.9


def test_the_config_of_another_trainer_is_refused(model_dir, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig

    from trl_credit import VAPOTrainer

    with pytest.raises(TypeError, match="VAPOConfig.*GRPOConfig"):
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
    with pytest.raises(ValueError, match="Qwen2ForTokenClassification has 2"):
        make_trainer(model_dir, tmp_path, critic=two_labels)
    with pytest.raises(ValueError, match="`critic_model_init_kwargs="):
        make_trainer(model_dir, tmp_path, critic=tiny_model(), critic_model_init_kwargs={"revision": "main"})
    with pytest.raises(OSError, match="no-such-critic"):
        make_trainer(model_dir, tmp_path, critic=str(tmp_path / "no-such-critic"))


def test_a_peft_config_in_the_config_must_be_a_dict(tmp_path):
    with pytest.raises(TypeError, match="`critic_peft_config`.*LoraConfig"):
        VAPOConfig(str(tmp_path), critic_peft_config=LoraConfig(r=4), **BASE)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, **kwargs: [float("inf")] * len(completions), "returned inf for completion 0"),
        (lambda completions, **kwargs: [[0.5] * 99] * len(completions), r"returned 99 rewards for completion 0, which"),
        (lambda completions, **kwargs: ["good"] * len(completions), r"returned 'good' \(str\) for completion 0"),
        (lambda completions, **kwargs: [1.0], r"returned 1 rewards, but 4 were expected"),
    ],
)
def test_a_reward_that_is_none_is_refused_by_name(reward, message, model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, reward)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.train()


def test_images_are_refused_by_name():
    from trl_credit.critics.token import refuse_images

    with pytest.raises(ValueError, match=r"\['pixel_values'\]"):
        refuse_images({"prompt_ids": torch.ones(1, 1), "pixel_values": torch.ones(1)})
