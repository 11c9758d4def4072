"""
Imitation of a noisy expert, then RL from the verdict at the end of each episode.

All runs of a study train side by side, as one batch of small networks: nothing passes between them, and ten take hardly
longer than one. The advantages, returns and value losses are the package's.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tasks import MountainCar, PrecisionCartPole
from torch import nn

from trl_credit.credit.fit import explained_variance, fit_sums
from trl_credit.credit.gae import gae, whiten
from trl_credit.credit.value_loss import binary_cross_entropy, squared_error


Task = PrecisionCartPole | MountainCar

EPOCHS = 4  # passes over a rollout, for the policy as for the critic
CLIP = 0.2
HIDDEN = 32


class Networks(nn.Module):
    """One multilayer perceptron for each run: `(runs, N, inputs)` to `(runs, N, outputs)`."""

    def __init__(self, runs: int, inputs: int, outputs: int):
        super().__init__()
        sizes = (inputs, HIDDEN, HIDDEN, outputs)
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.weights = nn.ParameterList(torch.randn(runs, i, o) * (2 / i) ** 0.5 for i, o in pairs)
        self.biases = nn.ParameterList(torch.zeros(runs, 1, o) for _, o in pairs)
        with torch.no_grad():
            self.weights[-1].mul_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w).relu()
        return torch.baddbmm(bias, x, weight)


@dataclass
class Rollout:
    """Episodes of all runs. A state is the observation and the share of the time that has passed."""

    states: torch.Tensor  # (runs, episodes, T, features)
    actions: torch.Tensor  # (runs, episodes, T)
    mask: torch.Tensor  # (runs, episodes, T), False after the end of the episode
    rewards: torch.Tensor  # (runs, episodes), 0 or 1

    def trained(self, *values: torch.Tensor) -> list[torch.Tensor]:
        """Of tensors `(runs, episodes, T, ...)` what was acted on, `(runs, N, ...)`, N the largest number of a run."""
        mask = self.mask.flatten(1)
        order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : mask.sum(1).max()]
        rows = torch.arange(len(mask)).unsqueeze(1)
        return [value.flatten(1, 2)[rows, order] for value in values]


def roll_out(task: Task, act: Callable, runs: int, episodes: int, seed: int, group: int = 1) -> Rollout:
    """`episodes` of each run; `group` of them at a time from the same start, for the transitions are deterministic."""
    envs = task.make(runs * episodes)
    observations, _ = envs.reset(seed=seed)
    if group > 1:
        envs.state = envs.state[:, ::group].repeat(group, axis=1)
        observations = envs.state.T.astype(np.float32)
    alive = np.ones(runs * episodes, dtype=bool)
    success = np.zeros_like(alive)
    states, actions, mask = [], [], []
    for step in range(task.horizon):
        time = np.full((len(alive), 1), step / task.horizon, dtype=np.float32)
        state = np.concatenate([observations / np.float32(task.scale), time], axis=1)
        states.append(torch.from_numpy(state).unflatten(0, (runs, episodes)))
        actions.append(act(states[-1], observations))
        mask.append(torch.from_numpy(alive).unflatten(0, (runs, episodes)))
        observations, _, terminated, _, _ = envs.step(actions[-1].flatten().numpy())
        ended = alive & (terminated | (step == task.horizon - 1))
        success |= ended & task.succeeded(observations, terminated)
        alive = alive & ~ended
        if not alive.any():
            break
    rewards = torch.from_numpy(success).float().unflatten(0, (runs, episodes))
    return Rollout(torch.stack(states, 2), torch.stack(actions, 2), torch.stack(mask, 2), rewards)


def sample(policies: Networks) -> Callable:
    """Actions drawn from the policies."""

    @torch.no_grad()
    def act(states, observations):
        logits = policies(states)
        return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)  # Gumbel's way to sample

    return act


def log_probabilities(policies: Networks, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Of the actions taken, `(runs, N)`."""
    return policies(states).log_softmax(-1).gather(2, actions.unsqueeze(2)).squeeze(2)


def per_run_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the trained positions of each run, added over runs, so that each has the gradient of its own mean."""
    return ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum()


def imitate(task: Task, runs: int, seed: int, demonstrations: int = 64, steps: int = 300) -> Networks:
    """The policies that RL starts from, fitted to episodes of an expert that often acts at random."""
    rng = np.random.default_rng(seed)

    def act(states, observations):
        random = rng.integers(task.actions, size=len(observations))
        chosen = np.where(rng.random(len(observations)) < task.noise, random, task.expert(observations))
        return torch.from_numpy(chosen).unflatten(0, states.shape[:2])

    rollout = roll_out(task, act, runs, demonstrations, seed)
    states, actions, mask = rollout.trained(rollout.states, rollout.actions, rollout.mask)
    policies = Networks(runs, states.shape[-1], task.actions)
    optimizer = torch.optim.Adam(policies.parameters(), lr=1e-2)
    for _ in range(steps):
        picked = torch.multinomial(mask.float(), 512, replacement=True)
        batch = states.gather(1, picked.unsqueeze(2).expand(-1, -1, states.shape[-1]))
        logits = policies(batch)
        step(optimizer, runs * F.cross_entropy(logits.flatten(0, 1), actions.gather(1, picked).flatten()))
    return policies


class PromptCritic:
    """SPPO: V(s_0) from the first state alone, fitted by binary cross-entropy; A = R - V(s_0) for every action."""

    def __init__(self, runs: int, features: int, learning_rate: float):
        self.networks = Networks(runs, features, 1)
        self.optimizer = torch.optim.Adam(self.networks.parameters(), lr=learning_rate)

    def logits(self, rollout: Rollout) -> torch.Tensor:
        return self.networks(rollout.states[:, :, 0]).squeeze(2)

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> torch.Tensor:
        mask = rollout.mask.flatten(0, 1)
        self.values = self.logits(rollout).sigmoid().unsqueeze(2).expand(rollout.mask.shape)
        # Generalised advantage estimation with γ = λ = 1 and the same value everywhere is R - V.
        return gae(rollout.rewards.flatten(), self.values.flatten(0, 1), mask)[0].view_as(rollout.mask)

    def fit(self, rollout: Rollout) -> None:
        for _ in range(EPOCHS):
            step(self.optimizer, binary_cross_entropy(self.logits(rollout), rollout.rewards).mean(-1).sum())


class TokenCritic:
    """PPO: a value for every state, fitted to λ-returns by squared error; GAE, whitened over the rollout of the run."""

    def __init__(self, runs: int, features: int, learning_rate: float, lam: float):
        self.networks = Networks(runs, features, 1)
        self.optimizer = torch.optim.Adam(self.networks.parameters(), lr=learning_rate)
        self.lam = lam

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> torch.Tensor:
        mask = rollout.mask.flatten(0, 1)
        values = self.networks(rollout.states.flatten(1, 2)).view(mask.shape)
        advantages, returns = gae(rollout.rewards.flatten(), values, mask, lam=self.lam)
        self.values, self.returns = (x.view_as(rollout.mask) for x in (values, returns))
        return torch.stack([whiten(a, m) for a, m in zip(advantages.view_as(rollout.mask), rollout.mask, strict=True)])

    def fit(self, rollout: Rollout) -> None:
        states, returns, mask = rollout.trained(rollout.states, self.returns, rollout.mask)
        for _ in range(EPOCHS):
            loss = squared_error(self.networks(states).squeeze(2), returns)
            step(self.optimizer, per_run_mean(loss, mask))


class BatchBaseline:
    """No critic: A = R - mean R over the rollout of the run."""

    def __init__(self, runs: int, features: int):
        pass

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        centred = rollout.rewards - rollout.rewards.mean(-1, keepdim=True)
        return centred.unsqueeze(2) * rollout.mask

    def fit(self, rollout: Rollout) -> None:
        pass


class GroupBaseline(BatchBaseline):
    """GRPO: the same over the `group` episodes from one start, divided by their standard deviation."""

    group = 8

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        groups = rollout.rewards.unflatten(1, (-1, self.group))
        scaled = (groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)
        return scaled.flatten(1).unsqueeze(2) * rollout.mask


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(task: Task, start: Networks, make_credit: Callable, learning_rate: float, updates: int, seed: int) -> dict:
    """
    RL from the policies `start`, which are left as they are.

    Returns a dictionary of lists `(updates, runs)`: success and environment steps of each rollout and, where there is a
    critic, how much of the variance of R its values explain, measured before it has seen these episodes.
    """
    torch.manual_seed(seed)
    policies = deepcopy(start)
    runs, features, _ = policies.weights[0].shape
    credit = make_credit(runs, features)
    optimizer = torch.optim.Adam(policies.parameters(), lr=learning_rate)
    log = {"success": [], "steps": [], "explained": []}
    for update in range(updates):
        group = getattr(credit, "group", 1)
        rollout = roll_out(task, sample(policies), runs, task.episodes, 10_000 * seed + update, group)
        advantages = credit.advantages(rollout)
        log["success"].append(rollout.rewards.mean(-1).tolist())
        log["steps"].append(rollout.mask.sum((1, 2)).tolist())
        log["explained"].append(explained(rollout, credit.values) if hasattr(credit, "values") else [])
        credit.fit(rollout)
        wanted = rollout.states, rollout.actions, advantages, rollout.mask
        states, actions, advantages, mask = rollout.trained(*wanted)
        with torch.no_grad():
            old_logps = log_probabilities(policies, states, actions)
        for _ in range(EPOCHS):
            ratio = (log_probabilities(policies, states, actions) - old_logps).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            step(optimizer, per_run_mean(-torch.minimum(ratio * advantages, clipped * advantages), mask))
    return log


def explained(rollout: Rollout, values: torch.Tensor) -> list[float | None]:
    """Explained variance of R over the actions of each run's rollout, `None` where all episodes end alike."""
    returns = rollout.rewards.unsqueeze(2).expand(rollout.mask.shape)
    shares = [explained_variance(fit_sums(*run)) for run in zip(values, returns, rollout.mask, strict=True)]
    return [None if math.isnan(share) else round(share, 4) for share in shares]
