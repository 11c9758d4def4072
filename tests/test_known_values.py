"""The critic learns, on a task whose values can be computed."""

import pytest
import torch
from chain_policy import LENGTH, LETTERS, chain_policy_dir, no_x, true_values
from datasets import Dataset
from tiny import tiny_model

from trl_credit import VAPOConfig, VAPOTrainer
from trl_credit.critics.token import make_token_critic


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    return chain_policy_dir(tmp_path_factory.mktemp("policy"))


@pytest.mark.slow
def test_explained_variance_against_the_true_values_is_above_08_and_v_falls_at_the_first_wrong_step(
    policy_dir, tmp_path
):
    kept = []

    class Keeping(VAPOTrainer):
        def assign_credit(self, rollout, rewards, mode):
            kept.append(super().assign_credit(rollout, rewards, mode))
            return kept[-1]

    trainer = Keeping(
        model=str(policy_dir),
        reward_funcs=no_x,
        args=VAPOConfig(
            str(tmp_path),
            per_device_train_batch_size=64,
            num_generations=1,
            max_completion_length=LENGTH,
            critic_pretraining_steps=100,
            critic_learning_rate=1e-2,
            critic_lr_scheduler_type="linear",
            max_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": [letter for letter in LETTERS[:-1] for _ in range(11)]}),
        critic=make_token_critic(tiny_model(hidden=32, seed=5, initializer_range=0.1)),
    )
    trainer.pretrain_critic()

    # Rollouts that it has not been fitted to.
    truth, values, drops = [], [], []
    letters = {token: i for i, token in enumerate(trainer.processing_class(LETTERS)["input_ids"])}
    table = true_values()
    rollouts = trainer.rollouts(skip=1)
    for _ in range(4):
        next(rollouts)
        rollout = kept[-1]
        for row in range(len(rollout["values"])):
            state, right = letters[rollout["prompt_ids"][row, -1].item()], True
            tokens = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()].tolist()
            for t, token in enumerate(tokens):
                truth.append(table[LENGTH - t, state].item() * right)
                values.append(rollout["values"][row, t].item())
                if right and letters.get(token) == LETTERS.index("x") and t + 1 < len(tokens):
                    drops.append((truth[-1], values[-1] - rollout["values"][row, t + 1].item()))  # V* falls to 0
                right = right and letters.get(token) != LETTERS.index("x")
                state = letters.get(token, 0)
    truth, values = torch.tensor(truth), torch.tensor(values)
    assert len(truth) > 500 and truth.var() > 0.03
    explained = 1 - ((truth - values).var() / truth.var()).item()
    true_drop, drop = torch.tensor(drops).mean(0).tolist()
    print(f"explained variance {explained:.3f}, drop {drop:.3f} of {true_drop:.3f} in {len(drops)} completions")
    assert explained > 0.8
    assert drop > 0.7 * true_drop > 0.2
