"""A critic that reads prompts: in its own tokens, each once, whatever the padding and the length."""

import json

import pytest
import torch
from peft import LoraConfig
from sppo_runs import (
    CONVERSATIONS,
    critic_dir,
    critic_ids,
    critic_tokenizer,
    make_critic,
    make_trainer,
    rollout_of,
    share_of_even,
)
from tiny import tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vapo_runs import PROMPTS

from trl_credit import SPPOTrainer
from trl_credit.critics.prompt import PAD, load_critic_tokenizer, pad_prompts, read_prompts, tokenize_prompts
from trl_credit.critics.token import head_of, make_token_critic


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return critic_dir(tmp_path_factory.mktemp("critic"))


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --- Reading a prompt


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_the_value_is_read_at_the_last_real_token_and_padding_moves_nothing(arch):
    if arch == "gpt2":  # learned positions, which padding on the left would move
        from transformers import GPT2Config, GPT2LMHeadModel

        config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        policy = GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=0, eos_token_id=0, **config))
    else:
        policy = tiny_model(arch)
    network = make_token_critic(policy)
    torch.nn.init.normal_(head_of(network).weight)
    prompts = [[7, 8, 9, 10], [11], [12, 13], [7, 8, 9, 11]]
    padded = torch.cat([torch.full((4, 5), PAD), pad_prompts(prompts)], dim=1)
    with torch.no_grad():
        together = read_prompts(network, padded)
        alone = [network(torch.tensor([ids])).logits[0, -1, 0].item() for ids in prompts]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 4


def test_a_conversation_is_rendered_in_the_critics_own_template_with_the_generation_prompt():
    for prompts in (CONVERSATIONS, PROMPTS):
        assert tokenize_prompts(critic_tokenizer(), prompts) == [critic_ids(prompt) for prompt in prompts]


def test_the_template_gets_tools_and_arguments_as_the_policys_does():
    template = "{{ tools[0].function.name }}{{ mode }}{% if add_generation_prompt %}:{% endif %}"
    (ids,) = tokenize_prompts(
        critic_tokenizer(template), CONVERSATIONS[:1], [{"function": {"name": "ab"}}], {"mode": "c"}
    )
    assert ids == critic_ids("abc") + critic_tokenizer()(":")["input_ids"]


def test_a_run_passes_its_tools_and_template_arguments_on(model_dir, critic, tmp_path):
    def add(a: int, b: int) -> int:
        """
        Adds.

        Args:
            a: One.
            b: Two.
        """
        return a + b

    template = "{{ tools[0].function.name }}{{ mode }}{% if add_generation_prompt %}:{% endif %}"
    trainer = make_trainer(
        model_dir,
        tmp_path,
        prompts=CONVERSATIONS,
        critic=critic,
        critic_processing_class=critic_tokenizer(template),
        chat_template_kwargs={"mode": "xyz"},
    )
    trainer.tools = [add]
    trainer.rollout_rows = [{"prompt": prompt} for prompt in CONVERSATIONS[:2]]
    prompts, _ = trainer.critic_reader.prompts(trainer.with_prompts({}))
    assert prompts.tolist() == 2 * [critic_tokenizer()("addxyz:")["input_ids"]]


def test_a_prompt_longer_than_the_critics_context_keeps_its_end_and_is_counted(model_dir, tmp_path):
    folder = critic_dir(tmp_path / "critic", max_position_embeddings=3)
    trainer = make_trainer(model_dir, tmp_path, critic=folder, per_device_train_batch_size=8)
    trainer.train()
    (rollout,), (rows,) = trainer.rollouts_seen, trainer.rows_seen
    prompts = [row["prompt"] for row in rows]
    read = [[i for i in ids if i != PAD] for ids in rollout["critic_prompts"].tolist()]
    assert read == [critic_ids(prompt)[-3:] for prompt in prompts]
    # "cd ef" and "b c d" have five letters, the others at most three.
    assert steps(trainer)[0]["critic/cut_prompts"] == 2 / 8
    # The policy has read them whole.
    assert rollout["prompt_mask"].sum(1).max() == 5


@pytest.mark.parametrize("critic_updates", [1, 2])
def test_each_distinct_prompt_goes_through_the_critic_once_for_its_value_and_once_an_update(
    critic_updates, model_dir, critic, tmp_path
):
    settings = {"num_generations": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    trainer = make_trainer(model_dir, tmp_path, critic=critic, critic_updates_per_step=critic_updates, **settings)
    trainer.train()
    assert len(trainer.rollouts_seen[0]["advantages"]) == 16, "four prompts"
    assert sum(trainer.prompts_read) == 4 + critic_updates * 4


def test_a_prompt_that_comes_twice_goes_through_once(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic, prompts=4 * ["ab"] + 4 * ["cd"])
    trainer.train()
    assert sum(trainer.prompts_read) == 2 * len({row["prompt"] for row in trainer.rows_seen[0]}) <= 4


# --- The tokenizer


def test_the_critics_tokenizer_is_saved_beside_it_and_read_from_there(model_dir, tmp_path):
    trainer = make_trainer(
        model_dir, tmp_path / "one", critic=make_critic(), critic_processing_class=critic_tokenizer()
    )
    trainer.train()
    trainer.save_model()
    saved = tmp_path / "one" / "critic"
    again = make_trainer(model_dir, tmp_path / "two", critic=saved, prompts=CONVERSATIONS)
    assert isinstance(again.critic_processing_class, PreTrainedTokenizerFast)
    assert tokenize_prompts(again.critic_processing_class, CONVERSATIONS) == [critic_ids(p) for p in CONVERSATIONS]
    prompts = pad_prompts([critic_ids("ab"), critic_ids("c")])
    assert torch.equal(again.critic_reader.prompt_values(prompts), trainer.critic_reader.prompt_values(prompts))
    # The policy's own is where the policy is.
    assert len(AutoTokenizer.from_pretrained(tmp_path / "one")) > 200


def test_without_a_critic_of_its_own_the_policys_tokens_are_read_as_the_policy_read_them(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, prompts=CONVERSATIONS)
    assert trainer.critic_processing_class is trainer.processing_class
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    assert torch.equal(rollout["critic_prompts"] != PAD, rollout["prompt_mask"].bool())
    assert torch.equal(rollout["critic_prompts"].clamp(min=0), rollout["prompt_ids"] * rollout["prompt_mask"])


def test_one_tokenizer_for_both_is_the_policys(model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    trainer = make_trainer(
        model_dir,
        tmp_path,
        critic=model_dir,
        processing_class=tokenizer,
        critic_processing_class=tokenizer,
        rollout=lambda prompts, trainer: rollout_of([f"{prompt}!" for prompt in prompts], trainer),
    )
    trainer.train()
    rollout = trainer.rollouts_seen[0]
    last = rollout["critic_prompts"][:, -1]
    assert tokenizer.decode(last) == "!" * len(last), "as the policy has read it, with what the rollout added"


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_a_checkpoint_without_a_tokenizer_is_refused(arch, tmp_path):
    tiny_model(arch).save_pretrained(tmp_path)  # for a Qwen2 transformers makes up a tokenizer without words
    with pytest.raises(ValueError, match="`critic_processing_class`"):
        load_critic_tokenizer(tmp_path)


# --- Adapters


def test_a_critic_with_adapters_trains_them_and_its_head_alone(model_dir, critic, tmp_path):
    settings = {"critic_peft_config": {"r": 4, "target_modules": "all-linear"}, "max_steps": 3}
    trainer = make_trainer(model_dir, tmp_path, critic=critic, **settings)
    start = {name: p.clone() for name, p in trainer.critic.named_parameters()}
    trainer.train()
    for name, p in trainer.critic.named_parameters():
        assert torch.equal(p, start[name]) != p.requires_grad, name
    trainer.save_model()
    saved = tmp_path / "critic"
    assert {"adapter_model.safetensors", "tokenizer.json"} <= {path.name for path in saved.iterdir()}
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(critic)
    again = make_trainer(model_dir, tmp_path / "again", critic=saved)
    prompts = pad_prompts([critic_ids("ab"), critic_ids("c")])
    assert torch.equal(again.critic_reader.prompt_values(prompts), trainer.critic_reader.prompt_values(prompts))


def test_a_critic_on_the_policys_base_reads_the_policys_prompts(model_dir, tmp_path):
    adapters = LoraConfig(r=4, target_modules="all-linear")
    settings = {"critic_share_base": True, "peft_config": adapters, "critic_initial_value": 0.25, "max_steps": 2}
    trainer = make_trainer(model_dir, tmp_path, **settings)
    trainer.train()
    first, second = trainer.rollouts_seen
    assert first["values"].tolist() == pytest.approx([0.25] * 4)
    assert (second["values"] - 0.25).abs().min() > 1e-6
    base = {p.data_ptr() for name, p in trainer.model.named_parameters() if "lora" not in name}
    shared = [p for name, p in trainer.critic.named_parameters() if "base_layer" in name]
    assert shared and all(p.data_ptr() in base for p in shared)


# --- What is logged


def test_calibration_is_that_of_all_completions_since_the_last_log(model_dir, critic, tmp_path):
    rewards = lambda completion_ids, **kwargs: [round(share) for share in share_of_even(completion_ids)]  # noqa: E731
    trainer = make_trainer(model_dir, tmp_path, rewards, critic=critic, max_steps=4, logging_steps=4, learning_rate=0.0)
    trainer.train()
    (entry,) = steps(trainer)
    values = torch.cat([rollout["values"] for rollout in trainer.rollouts_seen]).double()
    outcomes = torch.cat(trainer.rewards_seen).double()
    assert len(values) == 16 and 0 < outcomes.mean() < 1
    assert entry["critic/brier"] == pytest.approx((values - outcomes).square().mean().item(), rel=1e-5)
    error = 0.0
    for decile in range(10):
        found = ((values * 10).long() == decile).nonzero().flatten()
        assert entry[f"critic/decile_{decile}/count"] == len(found)
        if len(found):
            assert entry[f"critic/decile_{decile}/reward"] == pytest.approx(outcomes[found].mean().item())
            error += abs((values[found] - outcomes[found]).sum().item()) / 16
        else:
            assert f"critic/decile_{decile}/reward" not in entry
    assert entry["critic/ece"] == pytest.approx(error, rel=1e-5)
    for name, rows in (("right", outcomes == 1), ("wrong", outcomes == 0)):
        assert entry[f"critic/value_{name}"] == pytest.approx(values[rows].mean().item(), rel=1e-5)


def test_explained_variance_is_on_probabilities_over_all_completions_since_the_last_log(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic, max_steps=3, logging_steps=3)
    trainer.train()
    (entry,) = steps(trainer)
    values = [rollout["values"].double() for rollout in trainer.rollouts_seen]
    rewards = [rewards.double() for rewards in trainer.rewards_seen]

    def explained(v, r):
        return 1 - ((r - v).var(correction=0) / r.var(correction=0)).item()

    v, r = torch.cat(values), torch.cat(rewards)
    assert entry["critic/explained_variance"] == pytest.approx(explained(v, r), rel=1e-5)
    assert abs(explained((v / (1 - v)).log(), r) - explained(v, r)) > 0.1, "on logits"
    mean = sum(explained(v, r) for v, r in zip(values, rewards, strict=True)) / 3
    assert abs(mean - explained(v, r)) > 0.1, "a mean over rollouts"
    assert trainer.explained_variance == pytest.approx(explained(values[-1], rewards[-1]), rel=1e-5), "of the latest"


def test_the_completions_table_has_the_value_of_each(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic, log_completions=True, log_unique_prompts=False)
    trainer.train()
    assert list(trainer._logs["extra"]["value"]) == trainer.rollouts_seen[0]["values"].tolist()
    table = list(trainer._logs["advantages"])
    assert table == pytest.approx(trainer.rollouts_seen[0]["advantages"].tolist())


def test_the_card_of_the_critic_says_how_to_read_its_value(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic, reward_range=[-1, 1])
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "critic" / "README.md").read_text()
    assert "value = -1 + 2 * output.sigmoid()" in card and "| `reward_range` | `[-1.0, 1.0]` |" in card
    code = card.split("```python\n")[1].split("```")[0]
    names = {"path": str(tmp_path / "critic"), "input_ids": torch.tensor([critic_ids("ab")])}
    exec(code, names)
    assert names["value"].item() == pytest.approx(
        trainer.critic_reader.prompt_values(pad_prompts([critic_ids("ab")])).item(), abs=1e-6
    )


def test_the_trainer_is_published_under_its_name(model_dir, tmp_path):
    assert SPPOTrainer._paper["id"] == "2604.08865"
    trainer = make_trainer(model_dir, tmp_path)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "SPPO" in card and "| `critic_loss` | `bce` |" in card
