"""What a run logs about its critic: a critic that is given the true values gets what they can explain, and no more."""

import pytest
import torch
from chain_policy import LENGTH, LETTERS, chain_policy_dir, no_x, true_value
from datasets import Dataset

from trl_credit import VAPOConfig, VAPOTrainer


GENERATIONS = 8


class Keeping(VAPOTrainer):
    """Keeps its rollouts."""

    def assign_credit(self, rollout, rewards, mode):
        self.kept = [*getattr(self, "kept", []), super().assign_credit(rollout, rewards, mode)]
        return self.kept[-1]


class Knowing(Keeping):
    """Has the true values in its critic's place."""

    def state_values(self, rollout):
        rows, tokens = rollout["completion_mask"].shape
        values = torch.full((rows, tokens + 1), torch.nan)
        read = self.processing_class.batch_decode
        prompts = read(rollout["prompt_ids"], skip_special_tokens=True)
        for row, (ids, mask) in enumerate(zip(rollout["completion_ids"], rollout["completion_mask"], strict=True)):
            for t in range(int(mask.sum())):
                values[row, t] = true_value(prompts[row], self.processing_class.decode(ids[:t]))
        return values


def pretrained(trainer_class, tmp_path, steps: int):
    trainer = trainer_class(
        model=str(chain_policy_dir(tmp_path / "policy")),
        reward_funcs=no_x,
        args=VAPOConfig(
            str(tmp_path / "out"),
            per_device_train_batch_size=48 * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=LENGTH,
            critic_pretraining_steps=steps,
            critic_learning_rate=1e-2,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": [*LETTERS[:-1]] * 8 * steps}),
    )
    trainer.pretrain_critic()
    name = "critic_pretraining/explained_variance_within_prompt"
    return trainer.kept, [entry[name] for entry in trainer.state.log_history if name in entry]


def within_prompts(rollout) -> float:
    """Explained variance of the rewards, by loops: of every token, against the mean of its prompt's tokens."""
    spread = error = 0.0
    for first in range(0, len(rollout["values"]), GENERATIONS):
        rows = range(first, first + GENERATIONS)
        pairs = [
            (rollout["returns"][row, t].item(), rollout["values"][row, t].item())
            for row in rows
            for t in range(int(rollout["completion_mask"][row].sum()))
        ]
        mean = sum(r for r, _ in pairs) / len(pairs)
        offset = sum(r - v for r, v in pairs) / len(pairs)
        spread += sum((r - mean) ** 2 for r, _ in pairs)
        error += sum((r - v - offset) ** 2 for r, v in pairs)
    return 1 - error / spread


@pytest.mark.slow
def test_a_critic_that_is_given_the_true_values_gets_what_they_can_explain(tmp_path):
    (rollout,), (logged,) = pretrained(Knowing, tmp_path, steps=1)
    assert logged == pytest.approx(within_prompts(rollout), abs=1e-5)
    # That of `docs/results/critic_rates.md`, in a sample of 384.
    assert logged == pytest.approx(0.34, abs=0.1)


@pytest.mark.slow
def test_a_rollout_is_explained_before_the_critic_is_trained_on_it(tmp_path):
    kept, logged = pretrained(Keeping, tmp_path, steps=3)
    assert logged == pytest.approx([within_prompts(rollout) for rollout in kept], abs=1e-5)
    assert logged[0] == pytest.approx(0, abs=1e-6), "a fresh head, which has one value for all states"
    assert kept[0]["values"][kept[0]["completion_mask"].bool()].std() < 1e-6 < kept[1]["values"].std()
