"""The store of Monte-Carlo continuations: they are what the policy would do, and none is drawn twice."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chain_policy import LENGTH, LETTERS, chain_policy_dir, no_x, true_value
from tiny import tiny_model_dir

from trl_credit.critic_report import Decoding, ProbeSettings, draw_probes, load_policy
from trl_credit.critic_report.probes import find_cuts


PROMPTS = [{"prompt": letter} for letter in LETTERS[:-1]]
SETTINGS = {"completions": 2, "continuations": 8, "cuts": "1", "max_completion_length": LENGTH}


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    return str(chain_policy_dir(tmp_path_factory.mktemp("policy")))


@pytest.fixture
def policy(policy_dir):
    policy = load_policy(policy_dir, batch_size=512)
    policy.calls, generate = [], policy.model.generate

    def counted(**kwargs):
        policy.calls.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    policy.model.generate = counted
    return policy


@pytest.mark.slow
def test_continuations_have_the_value_that_the_chain_has(policy, tmp_path):
    settings = ProbeSettings(**{**SETTINGS, "continuations": 200})
    probes = draw_probes(tmp_path, policy, PROMPTS, no_x, settings)
    decode = policy.tokenizer.decode
    errors, spread = [], []
    for rollout in [*probes.rollouts, *(candidate for group in probes.candidates for candidate in group)]:
        for cut, returns in zip(rollout.cuts, rollout.returns, strict=True):
            truth = true_value(rollout.prompt, decode(rollout.completion_ids[:cut]))
            errors.append(returns.mean() - truth)
            spread.append(truth * (1 - truth) / len(returns))
    errors, spread = np.array(errors), np.array(spread)
    assert len(errors) > 80 and probes.candidates
    assert (errors[spread == 0] == 0).all() and (spread == 0).any()
    z = errors[spread > 0] / np.sqrt(spread[spread > 0])
    assert abs(z.mean()) < 3 / np.sqrt(len(z)) and 0.8 < z.std() < 1.2
    for group in probes.candidates:  # different ways on from one state
        assert len({tuple(candidate.completion_ids) for candidate in group}) == len(group) > 1
        assert len({tuple(candidate.completion_ids[:-1]) for candidate in group}) == 1


def test_a_second_time_nothing_is_sampled(policy, tmp_path):
    first = draw_probes(tmp_path, policy, PROMPTS, no_x, ProbeSettings(**SETTINGS))
    sequences = sum(policy.calls)
    states = sum(len(rollout.cuts) for rollout in first.rollouts) + sum(map(len, first.candidates))
    assert sequences == len(first.rollouts) + 8 * states, "each state its continuations, and no more"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    policy.calls.clear()
    second = draw_probes(tmp_path, policy, PROMPTS, no_x, ProbeSettings(**SETTINGS))
    assert policy.calls == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert second.sampled_tokens == first.sampled_tokens
    assert all((a.returns == b.returns).all() for a, b in zip(first.rollouts, second.rollouts, strict=True))


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3].split(os.pathsep)
from chain_policy import no_x
from test_probes import PROMPTS, SETTINGS
from trl_credit.critic_report import ProbeSettings, draw_probes, load_policy

policy = load_policy(sys.argv[1], batch_size=64)
sample, calls = policy.sample, []

def kill_in_the_fifth_call(*args):
    calls.append(args)
    if len(calls) == 5:
        with open(sys.argv[2] + "/continuations.jsonl", "a") as file:
            file.write('{"prompt": 0, "sam')  # as a line that was being written
        os.kill(os.getpid(), signal.SIGKILL)
    return sample(*args)

policy.sample = kill_in_the_fifth_call
draw_probes(sys.argv[2], policy, PROMPTS, no_x, ProbeSettings(**SETTINGS))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_what_is_on_disk(policy_dir, tmp_path):
    whole_policy, policy = load_policy(policy_dir, batch_size=64), load_policy(policy_dir, batch_size=64)
    settings = ProbeSettings(**SETTINGS)
    whole = draw_probes(tmp_path / "whole", whole_policy, PROMPTS, no_x, settings)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", KILLED, policy_dir, str(tmp_path / "parts"), paths]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    lines = (tmp_path / "parts" / "continuations.jsonl").read_text().splitlines()
    kept = len(lines) - 1
    assert kept > 0
    calls, sample = [], policy.sample
    policy.sample = lambda starts, *args: calls.append(len(starts)) or sample(starts, *args)
    parts = draw_probes(tmp_path / "parts", policy, PROMPTS, no_x, settings)
    states = sum(len(rollout.cuts) for rollout in whole.rollouts) + sum(map(len, whole.candidates))
    assert sum(calls) == 8 * (states - kept)
    for name in ("rollouts.jsonl", "continuations.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all((a.returns == b.returns).all() for a, b in zip(whole.rollouts, parts.rollouts, strict=True))


def test_probes_of_something_else_are_refused(policy, tmp_path):
    settings = ProbeSettings(**SETTINGS)
    draw_probes(tmp_path, policy, PROMPTS, no_x, settings)
    changed = ProbeSettings(**{**SETTINGS, "decoding": Decoding(temperature=0.7)})
    with pytest.raises(ValueError, match=r"holds probes with temperature=1.0, and temperature=0.7 is asked for"):
        draw_probes(tmp_path, policy, PROMPTS, no_x, changed)
    with pytest.raises(ValueError, match=r"holds probes with prompts='6 rows"):
        draw_probes(tmp_path, policy, PROMPTS[:-1], no_x, settings)
    with pytest.raises(ValueError, match=r"holds probes with rewards="):
        draw_probes(tmp_path, policy, PROMPTS, lambda completions, **_: [1.0] * len(completions), settings)
    other = load_policy(str(tiny_model_dir(tmp_path / "other")))
    assert other.identity.startswith("checkpoint:")
    with pytest.raises(ValueError, match=r"holds probes with policy="):
        draw_probes(tmp_path, other, PROMPTS, no_x, settings)


def test_a_model_in_memory_is_known_by_its_weights(policy):
    from trl_credit.critic_report import TransformersPolicy

    same = TransformersPolicy(policy.model, policy.tokenizer)
    assert same.identity == TransformersPolicy(policy.model, policy.tokenizer).identity
    policy.model.lm_head.weight.data[0, 0] += 1
    assert same.identity != TransformersPolicy(policy.model, policy.tokenizer).identity


@pytest.mark.parametrize(
    ("completion", "cuts", "expected"),
    [
        ("abcdefghijklmnopqrst", "deciles", list(range(0, 20, 2))),
        ("abc", "deciles", [0, 1, 2]),
        ("abcdefg", "3", [0, 3, 6]),
        ("abcdef", "3", [0, 3]),
        ("ab\ncd\n\ne\n", "lines", [0, 3, 6, 7]),
        ("a=b=c", "after:=", [0, 2, 4]),
        ("a=>b=>=>c", "after:=>", [0, 3, 6, 8]),
        ("é\né", "lines", [0, 3]),
    ],
)
def test_cuts(policy, completion, cuts, expected):
    assert find_cuts(policy.tokenizer(completion)["input_ids"], cuts, policy.tokenizer) == expected


def test_messages_are_continued_as_trl_renders_them(tmp_path):
    policy = load_policy(str(tiny_model_dir(tmp_path)))
    seen = []

    def length(prompts, completions, answer, **kwargs):
        seen.append((prompts[0], completions[0], answer[0]))
        return [len(completion[0]["content"]) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}]
    settings = ProbeSettings(completions=1, continuations=2, candidates=0, max_completion_length=8)
    (rollout,) = draw_probes(tmp_path / "probes", policy, rows, [length, length], settings).rollouts
    assert policy.tokenizer.decode(rollout.prompt_ids).endswith("2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert rollout.reward == 2 * len(policy.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True))
    assert seen[0][0] == rows[0]["prompt"] and seen[0][1][0]["role"] == "assistant" and seen[0][2] == "4"
    for cut, returns in zip(rollout.cuts, rollout.returns, strict=True):
        begun = policy.tokenizer.decode(rollout.completion_ids[:cut], skip_special_tokens=True)
        assert (returns >= 2 * len(begun)).all(), "what was given is part of what is scored"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"continuations": 1}, "`continuations` must be a whole number of at least 2, got 1"),
        ({"completions": 0}, "`completions` must be a whole number of at least 1, got 0"),
        ({"candidates": 1}, "`candidates` must be 0, or 2 to `continuations`"),
        ({"candidates": 17}, "`candidates` must be 0, or 2 to `continuations` \\(16\\)"),
        ({"cuts": "words"}, "`cuts` must be 'deciles', 'lines', a number of tokens or 'after:TEXT', got 'words'"),
        ({"cuts": "0"}, "`cuts` must be"),
        ({"cuts": "after:"}, "`cuts` must be"),
        ({"max_completion_length": 0}, "`max_completion_length` must be"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ProbeSettings(**settings)


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"top_p": 1.5}, "`top_p` must be in"),
        ({"top_k": -1}, "`top_k` must be"),
    ],
)
def test_bad_decoding(decoding, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**decoding)


def test_bad_prompts_and_rewards(policy, tmp_path):
    settings = ProbeSettings(**SETTINGS)
    with pytest.raises(ValueError, match="There are no prompts"):
        draw_probes(tmp_path, policy, [], no_x, settings)
    with pytest.raises(ValueError, match="Each row needs a `prompt`"):
        draw_probes(tmp_path, policy, [{"question": "a"}], no_x, settings)
    with pytest.raises(ValueError, match="scored no completion with two continuations"):
        draw_probes(tmp_path / "a", policy, PROMPTS, lambda completions, **_: [None] * len(completions), settings)
    with pytest.raises(ValueError, match="returned 1 rewards for 12 completions"):
        draw_probes(tmp_path / "b", policy, PROMPTS, lambda **_: [1.0], settings)


def test_the_store_is_a_data_set(policy, tmp_path):
    from datasets import load_dataset

    draw_probes(tmp_path, policy, PROMPTS[:2], no_x, ProbeSettings(**SETTINGS))
    files = str(tmp_path / "continuations.jsonl")
    table = load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "sample", "position", "candidate", "continuation_ids", "returns"} <= set(table.column_names)
    manifest = json.loads((tmp_path / "probes.json").read_text())
    assert manifest["settings"]["continuations"] == 8
