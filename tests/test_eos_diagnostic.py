"""The probability of ending, which GRPO-λ looks at with every loss, costs next to nothing."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model_dir
from torch.utils._python_dispatch import TorchDispatchMode
from vapo_runs import PROMPTS, SETTINGS, share_of_even

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer
from trl_credit.seam import loss as seam


class Operations(TorchDispatchMode):
    """How many are dispatched."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("critic_")}
    return GRPOLambdaTrainer(
        model=str(tiny_model_dir(folder)),
        reward_funcs=share_of_even,
        args=GRPOLambdaConfig(str(folder), temperature=0.7, **{**settings, "num_generations": 2}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )


def asked(trainer, completions, tokens, monkeypatch):
    """Probabilities of ending at random hidden states, those of the whole softmax, and the operations they took."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (completions, tokens), generator=generator)
    states = torch.randn(completions, tokens + 5, 16, generator=generator)
    log_probs = (states[:, 4:-1] @ trainer.model.get_output_embeddings().weight.T / 0.7).log_softmax(-1).detach()
    terms = SimpleNamespace(logps=log_probs.gather(2, ids.unsqueeze(2)).squeeze(2))
    monkeypatch.setattr(trainer, "_loss", SimpleNamespace(inputs={"completion_ids": ids}, hidden_states=states))
    with Operations() as counted:
        found = trainer.eos_prob(terms)
    return found, log_probs.exp()[..., trainer.eos_token_ids].sum(-1), counted.number


@pytest.mark.parametrize("pieces", [1, 7])
def test_it_is_that_of_the_whole_softmax_in_however_many_pieces(trainer, monkeypatch, pieces):
    monkeypatch.setattr(seam, "_TOKENS_AT_A_TIME", -(-3 * 40 // pieces))
    found, expected, _ = asked(trainer, 3, 40, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.max() > 0.1


def test_it_takes_as_few_operations_for_many_long_completions_as_for_one(trainer, monkeypatch):
    *_, one = asked(trainer, 1, 4, monkeypatch)
    *_, many = asked(trainer, 7, 520, monkeypatch)
    assert many == one <= 40
