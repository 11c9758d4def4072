"""A policy of the report draws as it is told, and stops at each of its ends."""

import torch
from tiny import tiny_model, tiny_tokenizer

from trl_credit.critic_report import Decoding, TransformersPolicy


def first_tokens(decoding):
    policy = TransformersPolicy(tiny_model(), tiny_tokenizer())
    return torch.tensor([ids[0] for ids in policy.sample([[65, 70, 80]] * 2000, [1] * 2000, decoding, seed=0)])


def test_top_p_and_top_k_and_temperature_bound_what_is_drawn():
    with torch.no_grad():
        probs = tiny_model()(torch.tensor([[65, 70, 80]])).logits[0, -1].softmax(-1)
    order = probs.argsort(descending=True)
    nucleus = set(order[: int((probs[order].cumsum(0) < 0.3).sum()) + 1].tolist())
    assert set(first_tokens(Decoding(top_p=0.3)).tolist()) == nucleus and len(nucleus) > 1
    assert set(first_tokens(Decoding(top_k=2)).tolist()) == set(order[:2].tolist())
    assert set(first_tokens(Decoding(temperature=1e-3)).tolist()) == {order[0].item()}
    assert len(first_tokens(Decoding()).unique()) > len(nucleus)


def test_each_of_several_ends_is_an_end():
    model = tiny_model()
    model.generation_config.eos_token_id = [70, 71]
    policy = TransformersPolicy(model, tiny_tokenizer())
    ends = {70, 71, tiny_tokenizer().eos_token_id}
    assert policy.eos_ids == ends
    samples = policy.sample([[65]] * 400, [40] * 400, Decoding(temperature=3.0), seed=0)
    assert {ids[-1] for ids in samples if len(ids) < 40} == ends
    assert not any(set(ids[:-1]) & ends for ids in samples)


def test_a_sample_takes_no_more_than_its_own_room():
    policy = TransformersPolicy(tiny_model(), tiny_tokenizer())
    rooms = [1, 7, 30, 3] * 15
    samples = policy.sample([[65, 66]] * 60, rooms, Decoding(), seed=0)
    assert all(1 <= len(ids) <= room for ids, room in zip(samples, rooms, strict=True))
    cut_off = [len(ids) for ids, room in zip(samples, rooms, strict=True) if ids[-1] not in policy.eos_ids]
    assert {1, 3, 7} <= set(cut_off)
