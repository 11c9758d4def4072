"""What SPPO refuses: the table of its page in the docs, and what a config alone cannot know."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from sppo_runs import CONVERSATIONS, critic_dir, critic_tokenizer, make_critic, make_trainer, share_of_even
from tiny import tiny_model, tiny_model_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM

from trl_credit import SPPOConfig
from trl_credit.critics.prompt import tokenize_prompts


BASE = {"bf16": False, "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4}


def table() -> list[tuple[str, str]]:
    """Settings and messages of the table in the docs."""
    section = (Path(__file__).parents[1] / "docs/trainers/sppo.md").read_text(encoding="utf-8").split("## Bad input")[1]
    return re.findall(r"^\| `(\w+=.*?)` \| (.*) \|$", section, flags=re.MULTILINE)


@pytest.mark.parametrize(("settings", "message"), table())
def test_a_config_that_cannot_be_meant_is_refused_as_the_docs_say(settings, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        SPPOConfig(str(tmp_path), **{**BASE, **eval(f"dict({settings})")})
    assert message in str(caught.value)


def test_the_table_is_read():
    assert len(table()) == 15


def test_defaults_are_the_papers_but_for_the_critics_rate(tmp_path):
    config = SPPOConfig(str(tmp_path), **BASE)
    assert (config.num_generations, config.critic_loss, config.reward_range) == (1, "bce", "running")
    # The paper's 5e-6 is in the recipes; here it is 0.1 / width, see docs/results/prompt_critic_rates.md.
    assert (config.critic_learning_rate, config.critic_pretraining_steps) == (None, 0)
    assert (config.epsilon, config.epsilon_high, config.beta) == (0.2, None, 0)
    assert (config.loss_type, config.scale_rewards, config.critic_initial_value) == ("dapo", "none", None)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"reward_range": [-1, 3], "critic_initial_value": 1.0}, 1.0),
        ({"critic_loss": "mse", "critic_initial_value": 7.0}, 7.0),
        ({"critic_initial_value": 0.2}, 0.2),
    ],
)
def test_the_initial_value_is_in_units_of_the_reward(settings, value, model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, **settings)
    assert trainer.critic_reader.prompt_values(torch.tensor([[70, 71], [72, 73]])).tolist() == pytest.approx(
        [value, value]
    )


# --- Rewards


def half(completion_ids, **kwargs):
    return [0.5] * len(completion_ids)


def two(completion_ids, **kwargs):
    return [2.0] * len(completion_ids)


def minus_one(completion_ids, **kwargs):
    return [-1.0] * len(completion_ids)


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (
            two,
            {"reward_range": [0, 1]},
            r"The reward 2 of completion 0 at step 0 lies outside `reward_range=\[0.0, 1.0\]` \('two' gave 2 with",
        ),
        (minus_one, {"reward_range": [0, 1]}, "The reward -1 of completion 0"),
        (
            two,
            {"reward_range": [0, 1]},
            r"Set `reward_range` to them, to 'running', or `critic_loss='mse'`, which takes",
        ),
        (two, {"reward_range": [0, 1.5]}, r"outside `reward_range=\[0.0, 1.5\]`"),
        (
            [half, two],
            {"reward_range": [0, 1], "reward_weights": [1.0, 0.5]},
            "'half' gave 0.5 with weight 1, 'two' gave 2 with weight 0.5",
        ),
    ],
)
def test_a_reward_outside_the_range_is_refused_with_the_ways_out(reward, settings, message, model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, reward, **settings)
    start = [p.clone() for p in trainer.critic.parameters()]
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.critic.parameters(), start, strict=True))


@pytest.mark.parametrize(
    ("reward", "settings"),
    [
        (minus_one, {"critic_loss": "mse"}),
        (minus_one, {"reward_range": [-1, 1]}),
        (two, {"reward_range": [0, 2]}),
        (two, {}),
    ],
)
def test_all_ways_out_are_ways_out(reward, settings, model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, reward, critic_initial_value=0.5, **settings)
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    torch.testing.assert_close(rollout["advantages"], trainer.rewards_seen[0] - rollout["values"])
    assert rollout["advantages"].abs().min() >= 1


def test_a_sum_of_weighted_rewards_may_be_off_by_its_rounding(model_dir, tmp_path):
    def ones(completion_ids, **kwargs):
        return [1.0] * len(completion_ids)

    trainer = make_trainer(model_dir, tmp_path, [ones] * 3, reward_weights=[0.7, 0.2, 0.1 + 1e-7])
    trainer.train()
    assert trainer.rollouts_seen[0]["critic_targets"].tolist() == [1] * 4


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, **kwargs: [float("inf")] * len(completions), "returned inf for completion 0"),
        (lambda completions, **kwargs: [[0.5]] * len(completions), r"returned \[0.5\] \(list\) for completion 0"),
        (lambda completions, **kwargs: ["good"] * len(completions), r"returned 'good' \(str\) for completion 0"),
        (lambda completions, **kwargs: [1.0], r"returned 1 rewards, but 4 were expected"),
    ],
)
def test_a_reward_that_is_none_is_refused_by_name(reward, message, model_dir, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(model_dir, tmp_path, reward).train()


# --- The critic


def test_a_critics_tokenizer_without_a_chat_template_is_refused_for_conversations(model_dir, tmp_path):
    settings = {"critic": make_critic(), "critic_processing_class": critic_tokenizer(chat_template=None)}
    make_trainer(model_dir, tmp_path, **settings).train()  # plain text needs none
    trainer = make_trainer(model_dir, tmp_path, prompts=CONVERSATIONS, **settings)
    with pytest.raises(ValueError, match="`chat_template`"):
        trainer.train()


def test_a_tokenizer_that_is_not_the_critics_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="knows 32 tokens, .* with a tokenizer of its own .`critic_processing_class`"):
        make_trainer(model_dir, tmp_path, critic=make_critic())  # a model in memory: the policy's tokenizer
    trainer = make_trainer(model_dir, tmp_path, critic=make_critic(), critic_processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="but the critic knows 32 tokens: Qwen2Tokenizer is not its tokenizer"):
        trainer.train()


def test_a_critic_of_prompts_that_reads_the_policys_tokens_must_know_them(model_dir, tmp_path):
    large, padded = tiny_model(vocab_size=4000), tiny_model(vocab_size=320)
    with pytest.raises(ValueError, match="of a Qwen2ForCausalLM knows 4000 tokens, the policy 259 and"):
        make_trainer(model_dir, tmp_path, critic=large)
    assert make_trainer(model_dir, tmp_path, critic=padded).critic.config.vocab_size == 320
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="critic' knows 32 tokens"):  # one tokenizer for both
        critic = critic_dir(tmp_path / "critic")
        make_trainer(model_dir, tmp_path, critic=critic, processing_class=tokenizer, critic_processing_class=tokenizer)


def test_a_policy_with_resized_embeddings_needs_a_critic_with_as_many(model_dir, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(8)])
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    policy.resize_token_embeddings(len(tokenizer))
    settings = {"processing_class": tokenizer, "critic_processing_class": tokenizer}
    with pytest.raises(ValueError, match="knows 259 tokens, the policy 267 .* if the policy's embeddings were resized"):
        make_trainer(policy, tmp_path, critic=model_dir, **settings)
    assert make_trainer(policy, tmp_path, **settings).critic.get_input_embeddings().num_embeddings == 267


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(ValueError, match="no token in a prompt.*''"):
        tokenize_prompts(critic_tokenizer(), ["ab", ""])


def test_a_tokenizer_for_a_critic_on_the_policys_base_is_refused(model_dir, tmp_path):
    adapters = LoraConfig(r=4, target_modules="all-linear")
    with pytest.raises(ValueError, match="`critic_processing_class`.*`critic_share_base=True`"):
        make_trainer(
            model_dir,
            tmp_path,
            critic_share_base=True,
            peft_config=adapters,
            critic_processing_class=critic_tokenizer(),
        )


def test_a_critic_that_is_given_twice_is_refused(model_dir, tmp_path):
    folder = critic_dir(tmp_path / "critic")
    with pytest.raises(ValueError, match="The critic is given twice"):
        make_trainer(model_dir, tmp_path, critic=folder, critic_model_name_or_path=str(folder))


class Counter:
    """An environment."""

    def reset(self, **kwargs):
        return " Begin at 0."

    def add(self, n: int) -> str:
        """
        Adds.

        Args:
            n: How much.

        Returns:
            The sum.
        """
        return str(n)


def test_an_environment_is_refused_for_a_critic_that_cannot_see_what_it_writes(tmp_path):
    template = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    model_dir = tiny_model_dir(tmp_path, chat_template=template, max_position_embeddings=2048)
    settings = {"rollout": None, "prompts": CONVERSATIONS, "environment_factory": Counter}
    with pytest.raises(ValueError, match="`environment_factory`"):
        make_trainer(model_dir, tmp_path, critic=critic_dir(tmp_path / "critic"), **settings)
    trainer = make_trainer(model_dir, tmp_path, **settings)
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    read = rollout["critic_prompts"][0].clamp(min=0)
    assert "Begin at 0.<|im_end|>" in trainer.processing_class.decode(read), "what the environment has added"


def test_images_are_refused_by_name(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path)
    rollout = {"prompt_ids": torch.ones(1, 1), "pixel_values": torch.ones(1)}
    with pytest.raises(ValueError, match=r"\['pixel_values'\]"):
        trainer.assign_credit(rollout, torch.ones(1), "train")


def test_the_config_of_another_trainer_is_refused(model_dir, tmp_path):
    from trl import GRPOConfig

    from trl_credit import SPPOTrainer

    with pytest.raises(TypeError, match="SPPOConfig.*GRPOConfig"):
        SPPOTrainer(str(model_dir), share_of_even, GRPOConfig(str(tmp_path), bf16=False, use_cpu=True))
