"""Small runs of GenAC for the tests, with a critic that has learned, in seconds, to answer with a score."""

import random
from functools import cache

import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from vapo_runs import PROMPTS, SETTINGS, fixed_rollout

from trl_credit import GenACConfig, GenACTrainer


TEMPLATE = "{success_rate} {problem}: {partial_solution} ="
GENAC = {
    "critic_template": TEMPLATE,
    "critic_max_completion_length": 24,
    "segment_min_length": 1,
    "segment_target_length": 3,
    "segment_max_length": 5,
    "critic_learning_rate": 1e-3,
}


def fit_critic(folder, unparsed: float = 0.15, context: int = 512, hidden: int = 32):
    """Saves a tiny critic with its tokenizer. With the probability `unparsed` its answer holds no score."""
    model = fitted_critic(unparsed, hidden)
    usual, model.config.max_position_embeddings = model.config.max_position_embeddings, context
    model.save_pretrained(folder)
    model.config.max_position_embeddings = usual  # others have the same model
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@cache
def fitted_critic(unparsed: float, hidden: int):
    """A model that has learned to answer with a score, whatever it is asked."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer=tokenizer, hidden=hidden, seed=1, initializer_range=0.1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rng = random.Random(0)
    for _ in range(150):
        texts, starts = [], []
        for _ in range(16):
            seen = "".join(chr(rng.randrange(64, 96)) for _ in range(rng.randint(1, 12)))
            text = TEMPLATE.format(
                success_rate=f"{rng.random():.2f}", problem=rng.choice(PROMPTS), partial_solution=seen
            )
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            answer = f"<score>{rng.randrange(11)}</score>" if rng.random() > unparsed else "hm"
            texts.append(prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id])
            starts.append(len(prompt))
        width = max(map(len, texts))
        ids = torch.tensor([text + [tokenizer.pad_token_id] * (width - len(text)) for text in texts])
        labels = ids.clone()
        for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
            labels[row, :start] = -100
            labels[row, len(text) :] = -100
        mask = (torch.arange(width) < torch.tensor([[len(text)] for text in texts])).long()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def share_of_even(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Watched(GenACTrainer):
    """Keeps its rollouts."""

    def assign_credit(self, rollout, rewards, mode):
        self.__dict__.setdefault("rewards_seen", []).append(rewards)
        credited = super().assign_credit(rollout, rewards, mode)
        self.__dict__.setdefault("rollouts_seen", []).append(credited)
        return credited


def make_trainer(model_dir, folder, reward=share_of_even, rollout=fixed_rollout, trainer=Watched, **settings):
    names = ("critic", "peft_config", "eval_dataset", "segmenter", "critic_processing_class")
    arguments = {name: settings.pop(name) for name in names if name in settings}
    return trainer(
        model=str(model_dir),
        reward_funcs=reward,
        args=GenACConfig(str(folder), **{**SETTINGS, **GENAC, **settings}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        rollout_func=rollout,
        **arguments,
    )
