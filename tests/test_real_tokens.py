"""A critic reads real tokens, and no more padding than a tenth of them, and learns what it learned from padded rows."""

import copy
import random

import pytest
import sppo_runs
import torch
from tiny import tiny_model
from transformers import TrainerCallback
from vapo_runs import make_trainer

from trl_credit import VAPOTrainer
from trl_credit.critics.batches import MOST_PADDING, shares_of_batches
from trl_credit.critics.token import make_token_critic, read_values


def skewed(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [min(round(rng.lognormvariate(6.5, 0.9)), 8192) for _ in range(count)]


def learned_critic():
    """One that has learned something: the head of a fresh one is zero."""
    network = make_token_critic(tiny_model(seed=1))
    with torch.no_grad():
        network.score.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return network


def passes_of(trainer) -> list[tuple[int, int]]:
    """Rows and columns of each forward pass of its critic from now on."""
    passes: list[tuple[int, int]] = []
    embeddings = trainer.critic.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: passes.append(tuple(args[0].shape)))
    return passes


# --- Which sequences are read together


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [1, 8192, 40000])
def test_every_sequence_is_read_once_within_the_limit_with_little_padding_and_in_step(processes, max_tokens):
    lengths = skewed(50)
    shares = shares_of_batches(lengths, max_tokens, processes)
    assert len(shares) == processes
    assert sorted(i for share in shares for part in share for i in part.tolist() if i >= 0) == list(range(50))
    read = 0
    for parts in zip(*shares, strict=True):
        assert len({len(part) for part in parts}) == 1
        for part in parts:
            width = max(lengths[i] for i in part)
            assert len(part) == 1 or len(part) * width <= max_tokens
            read += len(part) * width
    # What keeps a process in step is the shortest one once more.
    fillers = [i for share in shares for part in share for i in part.tolist() if i < 0]
    assert len(fillers) == -50 % processes and all(lengths[i] == min(lengths) for i in fillers)
    assert read <= (1 + MOST_PADDING) * (sum(lengths) + len(fillers) * min(lengths))
    tokens = [sum(lengths[i] for part in share for i in part) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_long_sequences_leave_room_for_the_padding_of_short_ones():
    # 400 tokens, 196 of which are real: the padding is a tenth of all that is real.
    assert [part.tolist() for part in shares_of_batches([100, 80, 10, 6, 2000], 1000)[0]] == [[4], [0, 1, 2, 3]]
    assert [part.tolist() for part in shares_of_batches([10, 6], 1000)[0]] == [[0], [1]]


def test_no_sequences_are_no_batches():
    assert shares_of_batches([], 100, 2) == [[], []]


def test_what_pads_a_row_is_not_read_and_moves_nothing():
    network = learned_critic().double()
    short = {"prompt_ids": [[7, 8]], "completion_ids": [[11, 12, 13]]}
    inputs = {name: torch.tensor(ids) for name, ids in short.items()}
    inputs |= {f"{name}_mask": torch.ones_like(inputs[f"{name}_ids"]) for name in ("prompt", "completion")}
    padded = {
        name: torch.nn.functional.pad(x, (5, 0) if name.startswith("prompt") else (0, 6)) for name, x in inputs.items()
    }
    widths = []
    network.get_input_embeddings().register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    values, of_padded = read_values(network, inputs), read_values(network, padded)
    assert widths == [5, 5] and of_padded.shape == (1, 10)
    assert torch.equal(values[0], of_padded[0, :4])


# --- In a run

ROLLOUT = 8  # completions, of 1 to 12 tokens
SETTINGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}


def run(model_dir, folder, trainer=VAPOTrainer, **settings):
    settings = {**SETTINGS, "critic": learned_critic(), "critic_learning_rate": 1e-2, **settings}
    made = make_trainer(model_dir, folder, trainer=trainer, **settings)
    passes = passes_of(made)
    made.train()
    return made, passes


@pytest.mark.parametrize("tokens", [1, 20, 10_000])
@pytest.mark.parametrize("settings", [{}, {"critic_updates_per_step": 2}, {"critic_lambda": 0.9, "num_iterations": 2}])
def test_what_is_read_together_changes_nothing_of_what_is_learned(tokens, settings, model_dir, tmp_path):
    expected, _ = run(model_dir, tmp_path, **settings)
    found, passes = run(model_dir, tmp_path, critic_update_batch_tokens=tokens, **settings)
    longest = max(width for _, width in passes)
    assert all(rows * width <= max(tokens, longest) for rows, width in passes)
    for of_found, of_expected in ((found.critic, expected.critic), (found.model, expected.model)):
        for name, weight in of_expected.state_dict().items():
            torch.testing.assert_close(of_found.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)


def test_it_reads_no_more_than_the_longest_sequences_of_a_micro_batch_have(model_dir, tmp_path):
    trainer, passes = run(model_dir, tmp_path)
    longest = max(width for _, width in passes)
    assert all(rows * width <= 2 * longest for rows, width in passes)
    assert max(rows * width for rows, width in passes) > longest


def test_prompts_are_read_together_however_small_the_policys_micro_batches(model_dir, tmp_path):
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "prompts": sppo_runs.PROMPTS}
    together, alone = (
        sppo_runs.make_trainer(
            model_dir, tmp_path, critic=learned_critic(), critic_update_batch_tokens=limit, **settings
        )
        for limit in (None, 1)
    )
    for trainer in (together, alone):
        trainer.train()
    assert sum(together.prompts_read) == sum(alone.prompts_read)
    assert max(together.prompts_read) > max(alone.prompts_read)
    for name, weight in alone.critic.state_dict().items():
        torch.testing.assert_close(together.critic.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)


# --- When it learns


class Later(VAPOTrainer):
    """Values a rollout, and learns from it when the policy has made its step."""

    learns_on_arrival = False


WAITS = [
    {"critic_lambda": 0.9},
    {"truncation": "bootstrap"},
    {"num_iterations": 2},
    {"critic_updates_per_step": 2},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
]


@pytest.mark.parametrize("settings", [{}, *WAITS])
def test_a_rollout_goes_through_the_critic_once_where_its_update_needs_no_values(settings, model_dir, tmp_path):
    _, passes = run(model_dir, tmp_path, max_steps=1, **settings)
    _, later = run(model_dir, tmp_path, Later, max_steps=1, **settings)
    assert sum(rows for rows, _ in passes) == (ROLLOUT if settings == {} else sum(rows for rows, _ in later))
    assert sum(rows for rows, _ in later) > ROLLOUT


@pytest.mark.parametrize(
    "settings", [{}, {"critic_loss": "bce", "reward_range": [-0.5, 1.0]}, {"critic_clip_range": 0.1}]
)
def test_learning_on_arrival_is_learning_later(settings, model_dir, tmp_path):
    (found, _), (expected, _) = (
        run(model_dir, tmp_path, kind, max_steps=3, critic_pretraining_steps=1, **settings)
        for kind in (VAPOTrainer, Later)
    )
    for of_found, of_expected in ((found.critic, expected.critic), (found.model, expected.model)):
        for name, weight in of_expected.state_dict().items():
            torch.testing.assert_close(of_found.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)
    for step, other in zip(found.state.log_history, expected.state.log_history, strict=True):
        assert step.keys() == other.keys()
        for name in other:
            if name.startswith("critic/") and not name.endswith("time"):
                assert step[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_a_rollout_without_any_reward_is_valued_all_the_same(model_dir, tmp_path):
    def none(completions, **kwargs):
        return [None] * len(completions)

    critic = learned_critic()
    before = copy.deepcopy(critic.state_dict())
    trainer, passes = run(model_dir, tmp_path, reward=none, critic=critic, max_steps=1)
    assert sum(rows for rows, _ in passes) == ROLLOUT
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.critic.state_dict().items())


@pytest.mark.parametrize("kind", [VAPOTrainer, Later])
def test_the_policys_gradient_is_gone_when_the_critic_is_updated(kind, model_dir, tmp_path):
    moments = []

    class Looking(kind):
        def critic_loss(self, network, inputs):
            moments.append(sum(p.grad is not None for p in self.model.parameters()))
            return super().critic_loss(network, inputs)

    run(model_dir, tmp_path, Looking)
    assert moments and set(moments) == {0}


def test_callbacks_at_the_end_of_a_step_see_the_critic_after_its_update(model_dir, tmp_path):
    class Watching(TrainerCallback):
        updates: list[int] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.updates.append(self.trainer.engine.steps)

    watching = Watching()

    class Watched(Later):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[watching], **kwargs)
            watching.trainer = self

    run(model_dir, tmp_path, Watched)
    assert watching.updates == [1, 2]
