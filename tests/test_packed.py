import random

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model
from torch.nn.attention.flex_attention import flex_attention

from trl_credit import GenACConfig
from trl_credit.critics.generative.branch_mask import block_mask, dense_mask, refuse_unpackable, sees
from trl_credit.critics.generative.packed import CriticQuery, answer_log_probs, plan_rows


VOCABULARY = 250
ARCHITECTURES = ["qwen2", "llama", "qwen3", "qwen3_moe"]


def tokens(rng, low, high):
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]


def completions(seed=0):
    """Three queries with uneven segments, states without an answer, an answer of one token, and no state at all."""
    rng = random.Random(seed)
    queries, answers = [], []
    for states in (5, 1, 0, 3):
        shared = tokens(rng, 3, 12)
        cuts = []
        for state in range(states):
            cuts.append(len(shared))
            shared += tokens(rng, 1, 25) if state < states - 1 else []
        queries.append(CriticQuery(shared, cuts, tokens(rng, 1, 6)))
        answers.append([tokens(rng, 1, 12) for _ in range(states)])
    answers[0][2] = []
    answers[0][3] = answers[0][3][:1]
    return queries, answers


def text_by_text(model, queries, answers, temperature):
    """Log-probabilities of each answer, from a forward pass over its own text, without a mask or positions."""
    result = {}
    for index, query in enumerate(queries):
        for state, prompt in enumerate(query.prompts()):
            answer = answers[index][state]
            if answer:
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0] / temperature
                chosen = logits[len(prompt) - 1 : -1].log_softmax(-1)
                result[index, state] = chosen.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return result


def by_answer(model, batches, temperature):
    result = {}
    for rows in batches:
        log_probs, present = answer_log_probs(model, rows, temperature)
        assert log_probs.dtype == torch.float32 and not log_probs[~present].any()
        names = [(row.index, state) for row in rows for state in row.states]
        for name, values, mask in zip(names, log_probs, present, strict=True):
            result[name] = values[mask]
    return result


def with_gradients(model, log_probs):
    """Each log-probability weighed by a number of its own, so that none can stand in for another."""
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (log_probs[name] * torch.randn(len(log_probs[name]), generator=generator)).sum() for name in sorted(log_probs)
    )
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected, tolerance=1e-4):
    """Relative to the largest number of each tensor."""
    assert actual.keys() == expected.keys() and len(actual) > 0
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= tolerance * value.abs().max() + 1e-12, name


FORMS = {
    "packed": {"max_tokens": 1000},
    "in groups": {"max_tokens": 70},
    "in groups, by the memory of the mask": {"max_tokens": 1000, "mask_bytes": 4 * 80 * 80},
    "naive": {"max_tokens": 1000, "packed": False},
    "naive, one by one": {"max_tokens": 1, "packed": False},
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.slow
def test_every_form_has_the_log_probabilities_and_gradients_of_separate_texts(arch):
    model = tiny_model(arch, max_position_embeddings=256)
    refuse_unpackable(model)
    for seed in range(2):
        queries, answers = completions(seed)
        expected = text_by_text(model, queries, answers, 0.7)
        gradients = with_gradients(model, expected)
        for limits in FORMS.values():
            batches = plan_rows(queries, answers, **limits)
            actual = by_answer(model, batches, 0.7)
            assert_close(actual, expected)
            assert_close(with_gradients(model, actual), gradients)


def test_eager_attention_takes_the_same_mask():
    model = tiny_model("qwen2")
    model.set_attn_implementation("eager")
    queries, answers = completions()
    expected = text_by_text(model, queries, answers, 1.0)
    assert_close(by_answer(model, plan_rows(queries, answers, 1000), 1.0), expected)


def test_adapters_and_gradient_checkpointing_change_nothing():
    model = tiny_model("qwen3")
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    queries, answers = completions()
    refuse_unpackable(model)
    expected = text_by_text(model, queries, answers, 1.0)
    gradients = with_gradients(model, expected)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    actual = by_answer(model, plan_rows(queries, answers, 1000), 1.0)
    assert_close(actual, expected)
    assert_close(with_gradients(model, actual), gradients)
    assert all("lora" in name for name in gradients)


def test_bfloat16_under_autocast_is_as_near_as_bfloat16_can_be():
    model = tiny_model("qwen2")
    queries, answers = completions()
    expected = by_answer(model, plan_rows(queries, answers, 1000), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        actual = by_answer(model, plan_rows(queries, answers, 1000), 1.0)
    assert_close(actual, expected, 0.1)


def test_an_answer_is_blind_to_other_answers_and_to_what_comes_after_its_state():
    model = tiny_model("qwen2")
    queries, answers = completions()
    before = by_answer(model, plan_rows(queries, answers, 1000), 1.0)
    state = 1
    cut = queries[0].cuts[state]
    other_ids = [(token + 1) % VOCABULARY for token in queries[0].shared_ids[cut:]]
    changed = CriticQuery(queries[0].shared_ids[:cut] + other_ids, queries[0].cuts, queries[0].tail_ids)
    others = [answer if k == state else [(t + 1) % VOCABULARY for t in answer] for k, answer in enumerate(answers[0])]
    after = by_answer(model, plan_rows([changed, *queries[1:]], [others, *answers[1:]], 1000), 1.0)
    torch.testing.assert_close(after[0, state], before[0, state], rtol=1e-6, atol=1e-6)
    assert (after[0, 4] - before[0, 4]).abs().max() > 1e-2


def test_every_answer_is_in_one_row_and_rows_stay_within_the_limits():
    for seed in range(60):
        rng = random.Random(seed)
        queries, answers = completions(seed)
        limit, packed = rng.choice([1, 40, 80, 200, 1000]), rng.random() < 0.8
        mask_bytes = rng.choice([None, 4 * 60**2, 4 * 150**2])
        batches = plan_rows(queries, answers, limit, packed, mask_bytes)
        rows = [row for batch in batches for row in batch]
        placed = [(row.index, state) for row in rows for state in row.states]
        assert sorted(placed) == [(i, k) for i, own in enumerate(answers) for k, answer in enumerate(own) if answer]
        for row in rows:
            assert row.answers == [answers[row.index][state] for state in row.states]
            assert len(row) == len(row.layout())
            assert len(row) <= limit or len(row.states) == 1
            assert packed or len(row.states) == 1
        for batch in batches:
            width = max(map(len, batch))
            assert len(batch) * width <= limit or len(batch) == 1
            if mask_bytes is not None and any(len(row.states) > 1 for row in batch):
                assert len(batch) * width**2 * 4 <= mask_bytes


def test_by_default_an_update_reads_less_than_four_times_a_long_completion():
    """Shapes of the paper: 69 segments of 120 tokens, answers of 300; a mask in bfloat16."""
    length, mask_bytes = 8192, int(GenACConfig.critic_mask_memory * 2**30)
    cuts = list(range(300, 300 + length, 120))
    query = CriticQuery([0] * cuts[-1], cuts, [1] * 40)
    batches = plan_rows([query], [[[2] * 300] * len(cuts)], GenACConfig.critic_update_batch_tokens, True, mask_bytes, 2)
    assert sum(len(row) for rows in batches for row in rows) < 4 * length


def test_groups_are_as_cheap_as_any_division_into_runs_of_states():
    """Against all divisions."""

    def cheapest(query, lengths, last, longest):
        if last < 0:
            return 0
        costs = []
        for first in range(last, -1, -1):
            row = query.cuts[last] + sum(lengths[first : last + 1])
            if row <= longest or first == last:
                costs.append(row + cheapest(query, lengths, first - 1, longest))
        return min(costs)

    for seed in range(40):
        rng = random.Random(seed)
        cuts = sorted(rng.sample(range(5, 200), 8))
        query = CriticQuery([0] * cuts[-1], cuts, [1, 2])
        answers = [tokens(rng, 1, 60) for _ in cuts]
        longest = rng.choice([150, 250, 400])
        rows = [row for batch in plan_rows([query], [answers], longest) for row in batch]
        lengths = [len(answer) + 1 for answer in answers]
        assert sum(map(len, rows)) <= cheapest(query, lengths, 7, longest) * 1.1


def test_a_process_without_answers_still_runs_the_network():
    model = tiny_model("qwen2")
    log_probs, present = answer_log_probs(model, [])
    assert log_probs.shape[0] == 0 and present.shape == log_probs.shape
    log_probs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_answers_that_do_not_match_the_states_are_refused():
    with pytest.raises(ValueError, match="Query 0 has 2 states and 1 answers"):
        plan_rows([CriticQuery([1, 2], [1, 2], [3])], [[[4]]], 100)
    with pytest.raises(ValueError, match="must follow"):
        CriticQuery([1, 2], [1, 2], [])


def row_of(seed, length):
    """Branch, position and cut of a row, padded on the left to `length`."""
    queries, answers = completions(seed)
    row = plan_rows(queries[:1], answers[:1], 1000)[0][0]
    layout = [(0, -1, 0, 0)] * (length - len(row)) + row.layout()
    return torch.tensor([layout]).unbind(-1)[1:]


def test_the_dense_mask_lets_a_token_see_its_own_text_and_no_more():
    branch, position, cut = row_of(0, 160)
    mask = dense_mask(branch, position, cut, torch.float32)[0, 0]
    for query in range(160):
        for key in range(160):
            b, k = branch[0, query].item(), branch[0, key].item()
            p = position[0, key] <= position[0, query]
            allowed = (b == k and p) or (k == 0 and b > 0 and position[0, key] < cut[0, query])
            assert (mask[query, key] == 0) == bool(allowed), (query, key)


def test_flex_attention_with_the_block_mask_is_attention_with_the_dense_mask():
    """In its slow form, which runs on a CPU, forward only."""
    rows = [torch.cat(pair) for pair in zip(row_of(0, 256), row_of(1, 256), strict=True)]
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 256, 16, generator=generator)
    mask = dense_mask(*rows, torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    actual = flex_attention(query, key, value, block_mask=block_mask(*rows))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert block_mask(*rows).shape == (2, 1, 256, 256)


def test_the_block_mask_skips_what_branches_do_not_share():
    """Branches of a block each: each sees one block of its own, and the two of the prefix up to its cut."""
    branch = torch.arange(10).clamp(min=1).sub(1).repeat_interleave(128)[None]
    within = torch.arange(1280)[None]
    position = torch.where(branch == 0, within, 128 + within % 128)
    cut = torch.where(branch > 0, 128, 0)
    assert block_mask(branch, position, cut).sparsity() > 70
    assert sees(branch, position, cut)(0, None, 1279, 0) and not sees(branch, position, cut)(0, None, 1279, 200)


class Wrapped(torch.nn.Module):
    """As DDP wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return self.module(**kwargs)


def test_a_wrapped_network_is_called_through_its_wrapper():
    model = tiny_model("qwen2")
    wrapped = Wrapped(model)
    calls = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    refuse_unpackable(wrapped)
    queries, answers = completions()
    (rows,) = plan_rows(queries, answers, 1000)
    torch.testing.assert_close(answer_log_probs(wrapped, rows)[0], answer_log_probs(model, rows)[0])
    assert calls == [1]


def test_networks_that_cannot_take_the_mask_are_refused_by_name():
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    flash = tiny_model("llama")
    flash.config._attn_implementation = "flash_attention_2"
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused = {
        r"Qwen2ForCausalLM.*layers of sliding_attention": tiny_model("qwen2", **sliding),
        r"LlamaForCausalLM.*'flash_attention_2'` takes no such mask": flash,
        r"Qwen2ForCausalLM.*PROMPT_TUNING puts tokens": get_peft_model(tiny_model("qwen2"), prompt_tuning),
    }
    for words, model in refused.items():
        with pytest.raises(ValueError, match=words):
            refuse_unpackable(model)


@pytest.mark.parametrize(
    "kind, fields, words",
    [
        ("mistral", {"sliding_window": 8, "head_dim": 8}, "sliding window of 8"),
        ("mamba", {"state_size": 4, "num_attention_heads": None}, "layers of linear_attention"),
        ("bloom", {"n_layer": 1, "n_head": 2}, "no .*position_ids"),
    ],
)
def test_architectures_without_full_attention_are_refused_by_name(kind, fields, words):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **fields}
    config = {"num_attention_heads": 2, "num_key_value_heads": 1, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{k: v for k, v in config.items() if v}))
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*{words}"):
        refuse_unpackable(model)
