"""What VinePPO refuses: the table of its page in the docs, and what a config alone cannot know."""

import importlib.resources
import re
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import tiny_model_dir
from vine_runs import PROMPTS, fixed_rollout, make_trainer

from trl_credit import VinePPOConfig, VinePPOTrainer


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/trainers/vineppo.md").read_text(encoding="utf-8")
BASE = {"bf16": False, "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4, "num_generations": 1}


def table() -> list[tuple[str, str]]:
    """Settings and messages of the table in the docs."""
    return re.findall(r"^\| `(\w+=.*?)` \| (.*) \|$", PAGE.split("## Bad input")[1], flags=re.MULTILINE)


@pytest.mark.parametrize(("settings", "message"), table())
def test_a_config_that_cannot_be_meant_is_refused_as_the_docs_say(settings, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        VinePPOConfig(str(tmp_path), **{**BASE, **eval(f"dict({settings})")})
    assert message in str(caught.value)


def test_the_table_is_read():
    assert len(table()) == 12


def never(prompts, trainer):
    raise AssertionError("something was generated")


def test_tools_are_refused_before_anything_is_generated(tmp_path):
    def look_up(word: str) -> str:
        """
        Look up a word.

        Args:
            word: The word.
        """
        return word

    # A chat template that TRL knows to have tools.
    template = (importlib.resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="VinePPOTrainer scores continuations .* nothing runs `tools`"):
        VinePPOTrainer(
            str(tiny_model_dir(tmp_path, chat_template=template)),
            lambda **kwargs: [],
            VinePPOConfig(str(tmp_path / "run"), **BASE),
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]]}),
            tools=[look_up],
        )


def test_images_are_refused_before_anything_is_generated(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, rollout=never)
    trainer.train_dataset = Dataset.from_dict({"prompt": PROMPTS, "images": [["a picture"]] * len(PROMPTS)})
    with pytest.raises(ValueError, match="has images. Drop the images"):
        trainer.train()


def test_tokens_that_the_policy_did_not_write_are_refused(model_dir, tmp_path):
    def rollout(prompts, trainer):
        output = fixed_rollout(prompts, trainer)
        return {**output, "env_mask": [[1, *[0] * (len(ids) - 1)] for ids in output["completion_ids"]]}

    with pytest.raises(ValueError, match="`env_mask` with zeros"):
        make_trainer(model_dir, tmp_path, rollout=rollout).train()


def test_a_segmenter_that_loses_tokens_is_refused(model_dir, tmp_path):
    def lost(token_ids, tokenizer, trainable=None):
        return [1]

    with pytest.raises(ValueError, match=r"the last is the number of tokens \(\d+\); got \[1\]"):
        make_trainer(model_dir, tmp_path, rollout=fixed_rollout, segmenter=lost).train()


def test_the_page_has_the_table_of_the_options_and_each_has_a_text():
    assert "<!-- options: trl_credit.trainers.vineppo.vineppo_config.VinePPOConfig -->" in PAGE
    fields = VinePPOConfig.__dataclass_fields__
    own = [name for name in VinePPOConfig.__annotations__ if name != "scale_rewards"]
    assert own == [*own[:2], "segment_min_length", "segment_target_length", "segment_max_length", "max_segments"]
    assert all(len(fields[name].metadata["help"]) > 20 for name in own)


def test_every_metric_is_on_the_page_and_every_metric_of_the_page_is_logged(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, per_device_train_batch_size=8, reward=right_now_and_then)
    trainer.train()
    logged = {name for name in trainer.state.log_history[0] if name.startswith("vine/")}
    section = PAGE.split("## Logged metrics")[1].split("## ")[0]
    named = set(re.findall(r"`(vine/\w+)`", section))
    for side in ("right", "wrong"):
        named |= {f"vine/value_{side}_at_{percent}" for percent in (0, 25, 50, 75, 100)}
    assert logged == named


def right_now_and_then(completion_ids, **kwargs):
    return [float(len(ids) % 2) for ids in completion_ids]


def test_the_recipe_is_a_config(tmp_path):
    import yaml

    settings = yaml.safe_load((ROOT / "trl_credit/recipes/vineppo.yaml").read_text(encoding="utf-8"))
    config = VinePPOConfig(str(tmp_path), **{**BASE, "per_device_train_batch_size": 8, **settings})
    assert (config.vine_continuations, config.num_generations, config.temperature) == (9, 8, 0.6)
