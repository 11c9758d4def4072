"""Models of the kinds that are published: with two ends of sequence, and with padding on either side of a prompt."""

import torch
from safetensors.torch import load_file
from test_grpo_lambda import make_rollout
from test_grpo_lambda import make_trainer as make_grpo_lambda
from tiny import tiny_model
from transformers import AutoTokenizer
from vapo_runs import LENGTH, PROMPTS, make_trainer

from trl_credit.critics.token import make_token_critic, read_values


def noisy_critic():
    network = make_token_critic(tiny_model(seed=1))
    with torch.no_grad():
        network.score.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return network


def ones(completions, **kwargs):
    return [1.0] * len(completions)


# --- Two ends of sequence


def one_with_each_end(prompts, trainer):
    """Of four completions two end, in the two ways there are, one with no room to go on, and two are cut off."""
    assert len(trainer.eos_token_ids) == 2
    ids = [
        [65, 66, trainer.eos_token_ids[0]],
        [65] * (LENGTH - 1) + [trainer.eos_token_ids[1]],
        [67] * LENGTH,
        [68] * LENGTH,
    ]
    return {
        "prompt_ids": trainer.processing_class(list(prompts))["input_ids"],
        "completion_ids": ids,
        "logprobs": [[0.0] * len(row) for row in ids],
    }


def test_a_completion_that_ends_in_either_way_has_ended(two_eos_dir, tmp_path):
    settings = {"critic": noisy_critic(), "policy_lambda": 0.0, "truncation": "bootstrap"}
    trainer = make_trainer(two_eos_dir, tmp_path, ones, one_with_each_end, **settings)
    trainer.train()
    (rollout,) = trainer.rollouts_seen
    assert trainer.is_cut_off(rollout).tolist() == [False, False, True, True]
    assert rollout["critic_mask"].sum(1).tolist() == [3, LENGTH, LENGTH, LENGTH]
    # λ = 0: the last advantage is the reward less the value of the last state, where nothing comes after it.
    last = rollout["critic_mask"].sum(1, keepdim=True) - 1
    surprise = rollout["advantages"].gather(1, last) - (1 - rollout["values"].gather(1, last))
    assert surprise[:2].abs().max() < 1e-6 < 1e-3 < surprise[2:].abs().min()


def test_the_probability_of_the_end_is_that_of_both_ends(two_eos_dir, tmp_path):
    trainer = make_grpo_lambda(two_eos_dir, tmp_path)
    seen = []
    trainer.shape_loss = lambda terms, mode: seen.append((terms, trainer.eos_prob(terms))) or terms
    rollout = make_rollout(trainer, off_policy=False)
    trainer._compute_loss(trainer.model, rollout)
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    start = rollout["prompt_ids"].shape[1] - 1
    probs = trainer.model(input_ids=ids, attention_mask=mask).logits[:, start:-1].softmax(-1)
    ((terms, found),) = seen
    expected = probs[..., trainer.eos_token_ids]
    assert (expected > 1e-6)[terms.mask].all()
    torch.testing.assert_close(found[terms.mask], expected.sum(-1)[terms.mask], rtol=1e-4, atol=1e-7)


# --- Prompts of different lengths


def test_values_do_not_depend_on_the_padding_of_prompts(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=noisy_critic())
    trainer.train()
    (rollout,) = trainer.rollouts_seen
    lengths = rollout["prompt_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1 and rollout["prompt_mask"][:, -1].all(), "padded on the left"
    network = noisy_critic()
    for row, length in enumerate(lengths):
        tokens = rollout["completion_mask"][row].sum()
        alone = {
            "prompt_ids": rollout["prompt_ids"][row : row + 1, -length:],
            "prompt_mask": rollout["prompt_mask"][row : row + 1, -length:],
            "completion_ids": rollout["completion_ids"][row : row + 1, :tokens],
            "completion_mask": rollout["completion_mask"][row : row + 1, :tokens],
        }
        mine = rollout["critic_mask"][row, :tokens].bool()  # a tool's tokens have no value
        values = read_values(network, alone)[0, :-1]
        torch.testing.assert_close(rollout["values"][row, :tokens][mine], values[mine], rtol=1e-5, atol=1e-6)


def test_a_tokenizer_that_pads_on_the_right_trains_as_one_that_pads_on_the_left(model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="right")
    assert len({len(ids) for ids in tokenizer(PROMPTS)["input_ids"]}) > 1
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(tokenizer=tokenizer).save_pretrained(tmp_path / "model")
    for model, name in ((tmp_path / "model", "right"), (model_dir, "left")):
        trainer = make_trainer(model, tmp_path / name, rollout=None, critic=noisy_critic(), max_steps=2)
        trainer.train()
        trainer.save_model()
    right, left = (load_file(tmp_path / name / "model.safetensors") for name in ("right", "left"))
    assert all(torch.equal(right[name], left[name]) for name in left)
    assert not torch.equal(left["lm_head.weight"], load_file(f"{model_dir}/model.safetensors")["lm_head.weight"])
