"""With transformers, the critic reads what the states of a completion share once, and answers as before."""

import random

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

from trl_credit.critics.critic import LocalRunner
from trl_credit.critics.generative.critic import GenerativeCritic
from trl_credit.critics.generative.packed import CriticQuery
from trl_credit.critics.generative.prefixes import Prefixes, StatePrompt, keeps_prefixes, tokens_read
from trl_credit.critics.generative.question import TEMPLATE_WITHOUT_HINT
from trl_credit.sampling import chunks_within


def questions(seed: int = 0) -> list[StatePrompt]:
    """Three completions with 6, 1 and 4 states, and tails of unlike length."""
    rng = random.Random(seed)

    def ids(number):
        return [rng.randrange(250) for _ in range(number)]

    prompts = []
    for states in (6, 1, 4):
        cuts = [rng.randint(0, 9)]
        for _ in range(states - 1):
            cuts.append(cuts[-1] + rng.randint(1, 20))
        query = CriticQuery(ids(cuts[-1]), cuts, ids(rng.randint(1, 7)))
        prompts += [StatePrompt(query, state) for state in range(states)]
    return prompts


def answers(network, prompts, once: bool, budget: int = 10**6, temperature: float = 1e-5):
    """Greedy ones, by default, of 12 tokens at most."""
    tokenizer = tiny_tokenizer()
    critic = GenerativeCritic(
        network,
        tokenizer,
        tokenizer,
        TEMPLATE_WITHOUT_HINT,
        max_completion_length=12,
        batch_tokens=budget,
        temperature=temperature,
        reads_prefixes_once=once,
    )
    torch.manual_seed(0)
    return critic.generate(prompts)


def tokens_of(network, prompts, once: bool, budget: int = 10**6) -> tuple[int, list]:
    """Tokens that the network is really given, and the answers."""
    seen = []
    hook = network.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    written = answers(network, prompts, once, budget)
    hook.remove()
    return sum(seen), written


@pytest.mark.parametrize(("arch", "budget"), [*((arch, 200) for arch in ARCHITECTURES), ("qwen2", 10**6), ("qwen2", 1)])
def test_greedy_answers_are_those_of_prompts_read_in_full(arch, budget):
    network = tiny_model(arch, hidden=32, initializer_range=0.2).eval()
    network = network if "moe" in arch else network.double()  # experts are multiplied in float32 at most
    prompts = questions()
    assert answers(network, prompts, True, budget) == answers(network, prompts, False, budget)


def test_adapters_take_part_in_what_is_kept():
    network = tiny_model(hidden=32, initializer_range=0.2)
    network = get_peft_model(network, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    network = network.double().eval()
    prompts = questions()
    own = answers(network, prompts, True)
    assert own == answers(network, prompts, False)
    with network.disable_adapter():
        assert own != answers(network, prompts, True)


def test_the_same_random_numbers_draw_the_same_answers():
    network, prompts = tiny_model(hidden=32, initializer_range=0.2).double().eval(), questions()
    drawn = answers(network, prompts, True, temperature=1.0)
    assert drawn == answers(network, prompts, False, temperature=1.0)
    assert drawn != answers(network, prompts, True)


def test_each_prefix_is_read_once_even_if_its_states_are_in_several_chunks():
    network = tiny_model(hidden=32, initializer_range=0.2).double().eval()
    prompts = questions()[:6]
    longest, tail = prompts[-1].shared, len(prompts[0].query.tail_ids)
    for budget in (10**6, 1):
        read, written = tokens_of(network, prompts, True, budget)
        in_full, _ = tokens_of(network, prompts, False, 1)
        steps = sum(map(len, written)) - len(written)  # all tokens of an answer but its last
        if budget == 1:  # no padding
            assert read - steps == longest + 6 * tail == tokens_read(prompts, once=True)
            assert in_full - steps == sum(map(len, prompts)) == tokens_read(prompts, once=False)
        assert read < in_full


def test_keys_and_values_are_dropped_when_no_state_needs_them():
    network, prompts = tiny_model().eval(), questions()
    families = [0] * 6 + [1] + [2] * 4
    chunks = chunks_within([len(prompt) for prompt in prompts], 100, families)
    assert len(chunks) > 3
    prefixes, held = Prefixes(network, prompts, chunks, pad=0), []
    with torch.no_grad():
        for chunk in chunks:
            prefixes.of(chunk)
            held.append(len(prefixes._kept))
    assert max(held) == 1 and held[-1] == 0


def test_chunks_keep_families_together_and_stay_within_their_budget():
    rng = random.Random(1)
    lengths = [rng.randint(1, 90) for _ in range(60)]
    families = [index % 7 for index in range(60)]
    chunks = chunks_within(lengths, 200, families)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(60))
    for chunk in chunks:
        assert max(lengths[i] for i in chunk) * len(chunk) <= 200
        assert [lengths[i] for i in chunk] == sorted((lengths[i] for i in chunk), reverse=True)
    for family in range(7):
        places = [number for number, chunk in enumerate(chunks) if any(families[i] == family for i in chunk)]
        assert places == list(range(places[0], places[-1] + 1))
    # In one chunk the order, and with it the random numbers, is that of prompts without a family.
    assert chunks_within(lengths, 10**6, families) == chunks_within(lengths, 10**6)


def test_windows_states_and_learned_prompts_are_read_in_full():
    assert keeps_prefixes(tiny_model())
    sliding = tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert not keeps_prefixes(sliding)
    tuned = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert not keeps_prefixes(tuned)
    prompts = questions()
    tokenizer = tiny_tokenizer()
    critic = GenerativeCritic(LocalRunner(sliding), tokenizer, tokenizer, max_completion_length=4)
    assert not critic.reads_prefixes_once and len(critic.generate(prompts)) == len(prompts)
