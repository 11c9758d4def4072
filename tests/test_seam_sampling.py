"""The services of the seam beside a rollout: continue prefixes, score completions, the sampler's log-probabilities."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_model_dir
from vine_runs import SETTINGS

from trl_credit.seam import CreditConfig, CreditTrainer
from trl_credit.seam.sampling import _chunks


PROMPTS = ["ab", "cd ef", "a", "b c d"]
OURS = ("vine_continuations", "segment_min_length", "segment_target_length", "segment_max_length")
COMMON = {name: value for name, value in SETTINGS.items() if name not in OURS} | {"num_generations": 1}


def share_of_even(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def length(completion_ids, log_extra, log_metric, **kwargs):
    log_extra("lengths", [len(ids) for ids in completion_ids])
    log_metric("longest", max(map(len, completion_ids)))
    random.random(), np.random.rand(), torch.rand(1)
    return [None if len(ids) == 3 else float(len(ids)) for ids in completion_ids]


class Asking(CreditTrainer):
    """Uses its services in `assign_credit`, as `ask` says."""

    config_class = CreditConfig
    _name = "asking"

    def assign_credit(self, rollout, rewards, mode):
        self.answers = [*getattr(self, "answers", []), self.ask(self, rollout, rewards)]
        return rollout


def nothing(trainer, rollout, rewards):
    return None


def make(
    model_dir, folder, ask=nothing, rewards=share_of_even, prompts=PROMPTS, eval_dataset=None, rollout=None, **settings
):
    trainer = Asking(
        str(model_dir),
        rewards,
        CreditConfig(str(folder), **{**COMMON, **settings}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=eval_dataset,
        rollout_func=rollout,
    )
    trainer.ask = ask
    return trainer


# --- sample


def test_continuations_end_with_the_first_eos_and_take_no_more_than_their_room(model_dir, tmp_path):
    trainer = make(model_dir, tmp_path)
    rooms = [1, 7, 30, 3] * 15
    continuations = trainer.sample([[65, 66 + i % 4] for i in range(60)], rooms)
    ends = set(trainer.eos_token_ids)
    assert all(1 <= len(tokens) <= room for tokens, room in zip(continuations, rooms, strict=True))
    assert all(not ends & set(tokens[:-1]) for tokens in continuations)
    assert {tokens[-1] in ends for tokens in continuations} == {True, False}
    cut_off = [(tokens, room) for tokens, room in zip(continuations, rooms, strict=True) if tokens[-1] not in ends]
    assert all(len(tokens) == room for tokens, room in cut_off)
    assert trainer.generation_config.max_new_tokens == trainer.args.max_completion_length


def test_a_second_end_of_sequence_ends_a_continuation_too(tmp_path):
    folder = tiny_model_dir(tmp_path, eos_token_id=[256, 70])
    trainer = make(folder, tmp_path / "run", temperature=3.0)
    assert len(trainer.eos_token_ids) == 2
    continuations = trainer.sample([[65]] * 200, 60)
    last = {tokens[-1] for tokens in continuations if len(tokens) < 60}
    assert last == set(trainer.eos_token_ids)
    assert not any(set(tokens[:-1]) & last for tokens in continuations)


def test_it_samples_with_the_temperature_of_the_run(model_dir, tmp_path):
    """The first token of 4000 continuations, against the model's own probabilities."""
    prefix = [65, 70, 80]
    for temperature in (0.7, 1.5):
        trainer = make(model_dir, tmp_path, temperature=temperature)
        first = torch.tensor([tokens[0] for tokens in trainer.sample([prefix] * 4000, 1)])
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prefix])).logits[0, -1].double()
        expected = (logits / temperature).softmax(-1)
        found = torch.bincount(first, minlength=len(expected)) / 4000
        error = (expected * (1 - expected) / 4000).sqrt().clamp(min=1e-3)
        assert ((found - expected) / error).abs().max() < 5
    greedy = make(model_dir, tmp_path, top_k=1)
    assert len(set(map(tuple, greedy.sample([prefix] * 8, 6)))) == 1


def test_padding_and_chunks_change_no_continuation_of_a_greedy_policy(model_dir, tmp_path):
    trainer = make(model_dir, tmp_path, top_k=1)
    prefixes = [[65 + i] * (1 + i % 5) for i in range(11)]
    rooms = [2 + i for i in range(11)]
    alone = [trainer.sample([prefix], room)[0] for prefix, room in zip(prefixes, rooms, strict=True)]
    for tokens in (1, 40, 65536):
        assert trainer.sample(prefixes, rooms, batch_tokens=tokens) == alone


def test_chunks_keep_to_budget_and_context_and_hold_everything_once():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(0, 30))]
        rooms = [rng.randint(1, 60) for _ in lengths]
        budget, context = rng.randint(50, 400), rng.randint(120, 200)
        chunks = _chunks(lengths, rooms, budget, context)
        assert sorted(index for chunk in chunks for index in chunk) == list(range(len(lengths)))
        for chunk in chunks:
            width = max(lengths[i] for i in chunk) + max(rooms[i] for i in chunk)
            assert len(chunk) == 1 or (width * len(chunk) <= budget and width <= context)


def test_no_prefixes_no_continuations(model_dir, tmp_path):
    assert make(model_dir, tmp_path).sample([], 5) == []


@pytest.mark.parametrize(
    ("prefixes", "room", "message"),
    [
        ([[65], []], 3, "cannot continue prefix 1: it has 0 tokens and room for 3"),
        ([[65]], [0], "cannot continue prefix 0: it has 1 tokens and room for 0"),
        ([[65]], [1, 2], "1 prefixes and 2 numbers in `room`"),
    ],
)
def test_what_cannot_be_continued_is_refused(model_dir, tmp_path, prefixes, room, message):
    with pytest.raises(ValueError, match=message):
        make(model_dir, tmp_path).sample(prefixes, room)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "image": object()},
        {"prompt": "a", "images": [object()]},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": object()}]}]},
    ],
)
def test_images_are_refused_by_name(model_dir, tmp_path, row):
    trainer = make(model_dir, tmp_path)
    trainer.rollout_rows = [row]
    with pytest.raises(ValueError, match="Asking continues completions by their tokens alone, .* has images"):
        trainer.sample([[65]], 3)
    with pytest.raises(ValueError, match="has images"):
        trainer.score([row], [[65]])


# --- score


def test_scores_are_weighted_sums_with_nan_where_nothing_was_scored(model_dir, tmp_path):
    trainer = make(model_dir, tmp_path, rewards=[length, share_of_even], reward_weights=[2.0, -1.0])
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    ids = [[64, 65], [64, 66, 68], [65], [64] * 5]
    assert trainer.score(rows, ids).tolist() == pytest.approx([4 - 0.5, -1.0, 2 - 0.0, 10 - 1.0])
    alone = make(model_dir, tmp_path, rewards=length)
    assert alone.score(rows, ids).tolist() == pytest.approx([2, float("nan"), 1, 5], nan_ok=True)
    assert alone.score([], []).shape == (0,)


@pytest.mark.parametrize("conversational", [False, True])
def test_scores_of_a_rollouts_own_completions_are_its_rewards(model_dir, tmp_path, conversational):
    """Whatever reward functions are given: texts or messages, columns of the row, ids."""
    seen = []

    def reward(prompts, completions, completion_ids, goal, **kwargs):
        seen.append((prompts, completions, completion_ids, goal))
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [
            len(set(text)) + goal_of + 0.1 * len(ids)
            for text, goal_of, ids in zip(texts, goal, completion_ids, strict=True)
        ]

    def own(trainer, rollout, rewards):
        ids = [
            row[mask.bool()].tolist()
            for row, mask in zip(rollout["completion_ids"], rollout["completion_mask"], strict=True)
        ]
        return trainer.score(trainer.rollout_rows, ids), rewards

    trainer = make(model_dir, tmp_path, own, reward)
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS] if conversational else PROMPTS
    trainer.train_dataset = Dataset.from_dict({"prompt": prompts, "goal": [1, 2, 3, 4]})
    trainer.train()
    ((scored, rewards),) = trainer.answers
    assert scored.equal(rewards) and len(set(rewards.tolist())) > 1
    assert seen[0] == seen[1]


def test_more_completions_than_a_rollout_are_scored_a_rollout_at_a_time(model_dir, tmp_path):
    sizes = []

    def reward(completion_ids, **kwargs):
        sizes.append(len(completion_ids))
        return [float(ids[0]) for ids in completion_ids]

    def many(trainer, rollout, rewards):
        return trainer.score([trainer.rollout_rows[0]] * 10, [[70 + i] for i in range(10)])

    trainer = make(model_dir, tmp_path, many, reward)
    trainer.train()
    assert trainer.answers[0].tolist() == list(range(70, 80))
    assert sizes == [4, 4, 4, 2]


def test_token_rewards_are_summed_and_those_of_the_rollout_kept(model_dir, tmp_path):
    class TokenRewards(Asking):
        takes_token_rewards = True

    def per_token(completion_ids, **kwargs):
        return [[0.5] * len(ids) for ids in completion_ids]

    def ask(trainer, rollout, rewards):
        before = trainer.rewards_where_they_fall(rollout, rewards)
        scored = trainer.score([trainer.rollout_rows[0]] * 2, [[70] * 3, [71]])
        return before, scored, trainer.rewards_where_they_fall(rollout, rewards)

    trainer = TokenRewards(
        str(model_dir),
        per_token,
        CreditConfig(str(tmp_path), **COMMON),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    trainer.ask = ask
    trainer.train()
    before, scored, after = trainer.answers[0]
    assert scored.tolist() == [1.5, 0.5]
    assert before.dim() == 2 and before.equal(after)


def test_an_infinite_reward_is_an_error_and_an_empty_completion_refused(model_dir, tmp_path):
    trainer = make(model_dir, tmp_path, rewards=lambda completions, **kwargs: [float("inf")] * len(completions))
    metrics = trainer._metrics
    with pytest.raises(ValueError, match="returned inf for completion 0"):
        trainer.score([{"prompt": "a"}], [[65]])
    assert trainer._metrics is metrics and trainer.rollout_func is None
    with pytest.raises(ValueError, match="at least one token for each completion"):
        trainer.score([{"prompt": "a"}], [[]])
    with pytest.raises(ValueError, match="got 1 rows"):
        trainer.score([{"prompt": "a"}], [[65], [66]])


def test_what_only_a_rollout_function_knows_is_refused_by_name(model_dir, tmp_path):
    def rollout(prompts, trainer):
        ids = [[70, 71] for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": ids, "logprobs": None, "steps_taken": [3] * len(ids)}

    def ask(trainer, rollout, rewards):
        trainer.score(trainer.rollout_rows[:1], [[70]])

    trainer = make(model_dir, tmp_path, ask, rollout=rollout)
    with pytest.raises(ValueError, match=r"`rollout_func` gives reward functions \['steps_taken'\]"):
        trainer.train()


# --- The run does not notice


def trace_of(trainer):
    """All that a run has counted, logged or drawn."""
    plain = {mode: {name: list(values) for name, values in of.items()} for mode, of in trainer._metrics.items()}
    return {
        "metrics": plain,
        "logs": {name: list(values) for name, values in trainer._logs.items() if not isinstance(values, dict)},
        "extra": {name: list(values) for name, values in trainer._logs["extra"].items()},
        "pending": (dict(trainer._pending_extra_logs), dict(trainer._pending_metrics)),
        "sums": {mode: dict(of) for mode, of in trainer._sums.items()},
        "tokens": trainer.state.num_input_tokens_seen,
        "step": (trainer._step, trainer.state.global_step),
        "rows": trainer.rollout_rows,
        "scores": trainer._scores.tolist(),
        "mode": trainer.model.training,
        "limit": trainer.generation_config.max_new_tokens,
        "numbers": (
            random.getstate(),
            tuple(np.random.get_state()[1]),
            torch.get_rng_state().tolist(),
        ),
    }


def test_sampling_and_scoring_leave_no_trace(model_dir, tmp_path):
    def ask(trainer, rollout, rewards):
        before = trace_of(trainer)
        trainer.sample([[65, 66]] * 5, 6)
        after_sample = trace_of(trainer)
        trainer.score(trainer.rollout_rows, [[64, 65]] * len(trainer.rollout_rows))
        return before, after_sample, trace_of(trainer)

    rows = Dataset.from_dict({"prompt": PROMPTS})
    trainer = make(model_dir, tmp_path, ask, length, eval_dataset=rows, log_completions=True)
    trainer.train()
    trainer.evaluate()
    assert len(trainer.answers) == 2
    for before, after_sample, after_score in trainer.answers:
        assert before["metrics"]["train"] or before["metrics"]["eval"]
        assert before == after_sample == after_score


def test_a_run_that_samples_and_scores_is_the_run_that_does_not(model_dir, tmp_path):
    def ask(trainer, rollout, rewards):
        trainer.sample([[65, 66]] * 5, 6)
        trainer.score(trainer.rollout_rows, [[64, 65]] * len(trainer.rollout_rows))

    def run(folder, ask):
        trainer = make(model_dir, folder, ask, length, max_steps=3)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [{name: x for name, x in entry.items() if "time" not in name} for entry in steps], trainer.model

    (plain, model), (asking, other) = run(tmp_path / "a", nothing), run(tmp_path / "b", ask)
    assert plain == asking
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_numbers_differ_from_call_to_call_and_step_to_step_and_come_again_with_the_run(model_dir, tmp_path):
    def ask(trainer, rollout, rewards):
        return [trainer.sample([[65, 66]] * 4, 8) for _ in range(2)]

    def run(folder, **settings):
        trainer = make(model_dir, folder, ask, max_steps=2, learning_rate=0.0, **settings)
        trainer.train()
        return trainer.answers

    first = run(tmp_path / "a")
    drawn = [str(continuations) for step in first for continuations in step]
    assert len(set(drawn)) == 4
    assert run(tmp_path / "b") == first
    assert run(tmp_path / "c", seed=1) != first


def test_rollouts_of_a_policy_that_does_not_move_have_numbers_of_their_own_also_when_some_are_skipped(
    model_dir, tmp_path
):
    def ask(trainer, rollout, rewards):
        return trainer.sample([[65, 66]] * 4, 8)

    trainer = make(model_dir, tmp_path, ask)
    rollouts = trainer.rollouts()
    for _ in range(3):
        next(rollouts)
    assert len(set(map(str, trainer.answers))) == 3
    resumed = make(model_dir, tmp_path, ask)
    next(resumed.rollouts(skip=2))
    assert resumed.answers == trainer.answers[2:]


# --- sampler_logps


def logps_of(model, rollout, temperature):
    found = torch.zeros(rollout["completion_ids"].shape, dtype=torch.float64)
    for row in range(len(found)):
        prompt = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()]
        ids = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()]
        logits = model(torch.cat([prompt, ids]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1].double() / temperature
        found[row, : len(ids)] = logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    return found


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}], ids=["computed", "TRL's"])
def test_sampler_logps_are_the_policys_own_at_the_temperature_of_the_run(model_dir, tmp_path, settings):
    from transformers import AutoModelForCausalLM

    def ask(trainer, rollout, rewards):
        logps = trainer.sampler_logps(rollout)
        return rollout, logps, trainer.model.training, torch.is_grad_enabled()

    trainer = make(model_dir, tmp_path, ask, temperature=0.7, gradient_checkpointing=True, **settings)
    trainer.train()
    rollout, logps, training, _ = trainer.answers[0]
    assert ("old_per_token_logps" in rollout) == bool(settings)
    with torch.no_grad():
        expected = logps_of(AutoModelForCausalLM.from_pretrained(model_dir), rollout, 0.7)
    mask = rollout["completion_mask"].bool()
    assert (logps.double() - expected)[mask].abs().max() < 1e-5
    assert not logps.requires_grad and training


def test_sampler_logps_are_those_that_a_rollout_function_gave(model_dir, tmp_path):
    def rollout(prompts, trainer):
        ids = [[70, 71] for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": ids, "logprobs": [[-1.5, -2.5] for _ in prompts]}

    trainer = make(
        model_dir, tmp_path, lambda trainer, rollout, rewards: trainer.sampler_logps(rollout), rollout=rollout
    )
    trainer.train()
    assert trainer.answers[0].tolist() == [[-1.5, -2.5]] * 4
