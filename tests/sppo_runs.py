"""Small runs of SPPO for the tests, with a critic of another architecture, tokenizer and chat template."""

from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vapo_oracle import Sample
from vapo_runs import PROMPTS, SETTINGS, fixed_rollout

from trl_credit import SPPOConfig, SPPOTrainer
from trl_credit.critics.token import make_token_critic


CONVERSATIONS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
# Shorter than the policy's, and in other words.
CRITIC_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)
_WORDS = ["<pad>", "<end>", "user", "answer", ":", " ", *"abcdefghijklmnopqrstuvwxyz"]
_IDS = {word: i for i, word in enumerate(_WORDS)}


def critic_tokenizer(chat_template: str | None = CRITIC_TEMPLATE) -> PreTrainedTokenizerFast:
    """Letters in another order than the policy's; its own padding would be on the right."""
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(_WORDS)}, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.add_tokens(["user", "answer"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", chat_template=chat_template
    )


def critic_ids(prompt) -> list[int]:
    """What the critic is to read, written by hand."""
    if isinstance(prompt, str):
        return [_IDS[letter] for letter in prompt]
    words = ["user", ":", *prompt[0]["content"], "answer", ":"]
    return [_IDS[word] for word in words]


def make_critic(hidden: int = 8, **config):
    """A Llama that has learned something: the head of a fresh critic is zero."""
    network = make_token_critic(
        tiny_model("llama", tokenizer=critic_tokenizer(), hidden=hidden, layers=1, seed=5, **config)
    )
    with torch.no_grad():
        network.score.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    return network


def critic_dir(folder: Path, **config) -> Path:
    """A critic as it is saved, with its tokenizer."""
    make_critic(**config).save_pretrained(folder)
    critic_tokenizer().save_pretrained(folder)
    return folder


def share_of_even(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def unscored_now_and_then(completion_ids, **kwargs):
    rewards = share_of_even(completion_ids)
    return [None if len(ids) % 5 == 4 else reward for ids, reward in zip(completion_ids, rewards, strict=True)]


def rollout_of(prompts, trainer):
    """[`fixed_rollout`] of conversations too, and of groups that are on several processes."""
    if not isinstance(prompts[0], str):
        template = trainer.processing_class.apply_chat_template
        prompts = [template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    start = trainer.accelerator.process_index * len(prompts)
    everywhere = fixed_rollout(gather_object(prompts), trainer)
    return {name: rows[start : start + len(prompts)] for name, rows in everywhere.items()}


class Watched(SPPOTrainer):
    """Keeps its rollouts, and counts the prompts that go through the critic."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rollouts_seen, self.rewards_seen, self.rows_seen, self.prompts_read = [], [], [], []
        embeddings = self.critic.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, output: self.prompts_read.append(len(args[0])))

    def assign_credit(self, rollout, rewards, mode):
        self.rewards_seen.append(rewards)
        self.rows_seen.append(self.rollout_rows)
        self.rollouts_seen.append(super().assign_credit(rollout, rewards, mode))
        return self.rollouts_seen[-1]


def make_trainer(
    model_dir, folder, reward=share_of_even, rollout=rollout_of, prompts=PROMPTS, trainer=Watched, **settings
):
    arguments = ("critic", "critic_processing_class", "processing_class", "peft_config", "eval_dataset")
    arguments = {name: settings.pop(name, None) for name in (*arguments, "environment_factory")}
    return trainer(
        model=model_dir if isinstance(model_dir, torch.nn.Module) else str(model_dir),
        reward_funcs=reward,
        args=SPPOConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=prompts if not isinstance(prompts, list) else Dataset.from_dict({"prompt": prompts}),
        rollout_func=rollout,
        **arguments,
    )


def samples_of(rollout, rewards):
    """A rollout without its padding, for the oracle."""
    samples = []
    for row in range(len(rollout["completion_ids"])):
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()].tolist()
        completion = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()].tolist()
        trained = rollout["tool_mask"][row][: len(completion)].bool().tolist()
        reward = rewards[row].item()
        samples.append(Sample(prompt, completion, trained, None if reward != reward else [reward], False))
    return samples
