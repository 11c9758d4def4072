"""How noisy the gradient of an estimator is at a fixed policy, and how much better it could be: no training needed."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trl_credit.credit.gae import gae
from trl_credit.credit.traces import adjoint_trace

from .cell import Cell
from .exact import transitions
from .sampling import sample
from .tasks import prepare
from .trainers import batch_mean_advantages
from .walks import WalkTask


GROUP = 8
LAMBDAS = (0.0, 0.9, 1.0)


@dataclass
class Moments:
    """First and second moments of the gradients of equal parts of many completions."""

    total: torch.Tensor | float = 0.0
    squares: float = 0.0
    parts: int = 0

    def add(self, gradient: torch.Tensor) -> None:
        """The gradient of one more part, a mean over its completions."""
        self.total = self.total + gradient
        self.squares += gradient.square().sum().item()
        self.parts += 1

    def noise_scale(self, completions: int) -> float:
        r"""
        \\( \mathrm{tr} \Sigma / |G|^2 \\) (arXiv:1812.06162), in completions: with as many, noise and signal are level.

        Args:
            completions (`int`):
                Those of a part.
        """
        n = self.parts
        mean_square = self.squares / n
        # Both without bias: products of different parts alone tell of the signal.
        signal = (torch.as_tensor(self.total).square().sum().item() - self.squares) / (n * (n - 1))
        return completions * (mean_square - signal) / signal if signal > 0 else float("inf")


def measure_noise(name: str, fit: int, completions: int, cache: Path, tokens: int = 0, part: int = 16) -> dict:
    """
    Headroom of a task, and gradient noise scale of each estimator, at one policy.

    Args:
        name (`str`):
            The task, one of walks: its values must be known.
        fit (`int`):
            Seed of the start model.
        completions (`int`):
            How many to measure with.
        cache (`Path`):
            Where start models are kept.
        tokens (`int`, *optional*, defaults to `0`):
            Measure at the policy that exact values have trained with so many tokens, not at the start policy.
        part (`int`, *optional*, defaults to `16`):
            Completions of a gradient, a multiple of the group's 8.

    Returns:
        `dict`: `reward`; `headroom`, the ratio of the means of (R - V₀)² |s|² and A² |s|² over tokens, with V₀ the
        value of the prompt, A the exact advantage and s the score of the sampled token's logits; `noise_scale` by
        estimator, in completions; and the `correlation` of its advantages with the exact ones, over tokens.
    """
    task, folder, _ = prepare(name, fit, cache)
    if not isinstance(task, WalkTask):
        raise ValueError(f"The values of {name!r} are not known: its headroom cannot be measured.")
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if tokens:
        with tempfile.TemporaryDirectory() as output:
            cell = Cell("", "oracle", name, fit, seed=0, tokens=tokens, settings={"learning_rate": 1e-3})
            trainer, _ = cell.train(cache, Path(output))
            model.load_state_dict(trainer.model.state_dict())
    generator = torch.Generator().manual_seed(50_000 + fit)
    steps = transitions(model, task)
    moments: dict[str, Moments] = {}
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    sums = torch.zeros(2, dtype=torch.float64)
    for repeats in (1, GROUP):
        prompts = task.prompts(completions // repeats, generator).repeat_interleave(repeats, 0)
        completed = torch.cat(
            [
                sample(model, some, torch.ones_like(some), task.completion_length, generator)
                for some in prompts.split(1024)
            ]
        )
        every_value = task.values(steps, prompts, completed)
        every_reward = task.rewards(prompts, completed)
        for rows in torch.arange(len(prompts) // part * part).split(part):
            earned, values = every_reward[rows], every_value[rows]
            logps, score = _logps(model, prompts[rows], completed[rows])
            exact = values[:, 1:] - values[:, :-1]
            for estimator, advantages in _estimators(earned, values, repeats).items():
                loss = (advantages * logps).sum() / part
                gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
                moments.setdefault(estimator, Moments()).add(torch.cat([g.flatten() for g in gradients]))
                pairs.setdefault(estimator, []).append((advantages.expand_as(exact), exact))
            if repeats == 1:
                sums[0] += ((earned - values[:, 0]).square().unsqueeze(1) * score).sum().item()
                sums[1] += (exact.square() * score).sum().item()
        reward = every_reward.mean().item()
    return {
        "task": name,
        "fit": fit,
        "tokens": tokens,
        "completions": completions,
        "reward": reward,
        "headroom": (sums[0] / sums[1]).item(),
        "noise_scale": {estimator: of.noise_scale(part) for estimator, of in moments.items()},
        "correlation": {estimator: _correlation(of) for estimator, of in pairs.items()},
    }


def _estimators(rewards: torch.Tensor, values: torch.Tensor, repeats: int) -> dict[str, torch.Tensor]:
    """Advantages by estimator, `(B, T)` or `(B, 1)`: those of groups if prompts are repeated, else the others."""
    mask = torch.ones_like(values[:, :-1])
    if repeats == 1:
        known = {f"exact, λ {lam:g}": gae(rewards, values[:, :-1], mask, lam=lam)[0] for lam in LAMBDAS}
        return {"batch mean": batch_mean_advantages(rewards).unsqueeze(1), **known}
    groups = rewards.view(-1, repeats)
    grpo = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    weights = adjoint_trace(mask, mask, 0.99)
    return {"GRPO": grpo, "GRPO-λ": grpo.clamp(min=-0.1) * weights, "GRPO, position weights": grpo * weights}


def _logps(model, prompts: torch.Tensor, completions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens, with gradient, and the squared norms of their scores, both `(B, T)`."""
    ids = torch.cat([prompts, completions], dim=1)
    every = model(ids, logits_to_keep=completions.shape[1] + 1).logits[:, :-1].log_softmax(-1)
    logps = every.gather(2, completions.unsqueeze(2)).squeeze(2)
    probabilities = every.detach().exp()
    score = 1 - 2 * logps.detach().exp() + probabilities.square().sum(-1)
    return logps, score


def _correlation(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    given, exact = (torch.cat([pair[i].flatten() for pair in pairs]).double() for i in (0, 1))
    return torch.corrcoef(torch.stack([given, exact]))[0, 1].item()
