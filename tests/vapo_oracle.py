"""VAPO written as its papers do: one completion at a time, no padding, loops over tokens, float64."""

import copy
import math
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM


@dataclass
class Sample:
    prompt: list[int]
    completion: list[int]
    trained: list[bool]  # False: a tool's token
    rewards: list[float] | None  # on the completion's tokens; None: not scored
    cut_off: bool
    old_logps: list[float] | None = None
    sampler_logps: list[float] | None = None  # where they are not the old policy's


def logps(policy, sample):
    logits = policy(torch.tensor([sample.prompt + sample.completion])).logits[0, len(sample.prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(sample.completion)), sample.completion]


def states(critic, sample):
    """The critic's output before each token of the completion, and after its last."""
    ids = torch.tensor([sample.prompt + sample.completion])
    return critic(ids).logits[0, len(sample.prompt) - 1 :, 0].double()


def in_range(args, output):
    if args.reward_range is None:
        return output
    low, high = args.reward_range
    return low + (high - low) / (1 + (-output).exp())


def estimate(sample, values, gamma, lam, bootstrap):
    """Advantage and return of each trained token."""
    tokens = [t for t, trained in enumerate(sample.trained) if trained]
    after = values[len(sample.completion)] if bootstrap and sample.cut_off else 0.0
    advantage, out = 0.0, {}
    for k in reversed(range(len(tokens))):
        t = tokens[k]
        end = tokens[k + 1] if k + 1 < len(tokens) else len(sample.completion)
        reward = sum(sample.rewards[t:end])
        following = values[end] if k + 1 < len(tokens) else after
        delta = reward + gamma * following - values[t]
        advantage = delta + gamma * lam * advantage
        out[t] = (advantage, advantage + values[t])
    return out


def policy_lambda(args, length):
    if args.policy_lambda == "length_adaptive":
        return min(max(1 - 1 / (args.length_adaptive_alpha * length), 0), 1)
    if args.policy_lambda == "relative_position":
        return args.relative_position_weight ** (1 / max(length - 1, 1))
    return args.policy_lambda


class Oracle:
    def __init__(self, policy, critic, args):
        self.args = args
        # From its checkpoint: TRL has patched the forward of the one in the trainer.
        self.policy = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)
        self.critic = copy.deepcopy(critic).double()
        self.optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=args.critic_learning_rate, eps=args.adam_epsilon, weight_decay=0.0
        )

    def judge(self, samples):
        """What is fixed when a rollout is made: advantages and returns of its tokens, old log-probabilities."""
        credit = []
        with torch.no_grad():
            for sample in samples:
                sample.old_logps = logps(self.policy, sample).tolist()
                if sample.rewards is None:
                    credit.append({})
                    continue
                values = in_range(self.args, states(self.critic, sample)).tolist()
                bootstrap = self.args.truncation == "bootstrap"
                lam = policy_lambda(self.args, sum(sample.trained))
                advantages = estimate(sample, values, self.args.gamma, lam, bootstrap)
                returns = estimate(sample, values, self.args.gamma, self.args.critic_lambda, bootstrap)
                credit.append({t: (advantages[t][0], returns[t][1], values[t]) for t in advantages})
        return credit

    def policy_loss(self, samples, credit):
        trained = sum(sum(sample.trained) for sample in samples)  # unscored ones have zero advantages, but count
        surrogate, nll, positive = 0.0, 0.0, 0
        self.masked = []
        for sample, tokens in zip(samples, credit, strict=True):
            now = logps(self.policy, sample)
            right = sample.rewards is not None and sum(sample.rewards) > self.args.positive_reward_threshold
            for t, (advantage, _, _) in tokens.items():
                if self.args.trust_region == "clip":
                    ratio = (now[t] - sample.old_logps[t]).exp()
                    clipped = ratio.clamp(1 - self.args.epsilon, 1 + self.args.epsilon_high)
                    surrogate = surrogate - torch.minimum(ratio * advantage, clipped * advantage)
                else:
                    surrogate = surrogate - self.trusted(now[t], sample.sampler_logps[t], advantage)
                if right:
                    nll, positive = nll - now[t], positive + 1
        return surrogate / trained + self.args.positive_lm_coef * nll / max(positive, 1)

    def trusted(self, now, then, advantage):
        """r·A where the token is in the trust region, else 0; `masked` keeps what was left out."""
        ratio, pi, mu = (now - then).exp(), now.exp().item(), math.exp(then)
        if self.args.trust_region == "dis":
            inside = 1 - self.args.epsilon <= ratio <= 1 + self.args.epsilon_high
        else:
            divergence = abs(pi - mu)
            if self.args.trust_region == "dppo_kl":
                divergence = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
            away = (advantage > 0 and ratio > 1) or (advantage < 0 and ratio < 1)
            inside = not (away and divergence > self.args.trust_region_threshold)
        self.masked.append(0 if inside else 1 if ratio > 1 else -1)
        return ratio * advantage * inside

    def critic_loss(self, samples, credit):
        total, count = 0.0, 0
        for sample, tokens in zip(samples, credit, strict=True):
            if not tokens:
                continue
            values = in_range(self.args, states(self.critic, sample))
            for t, (_, target, old) in tokens.items():
                if self.args.critic_loss == "bce":
                    low, high = self.args.reward_range
                    share, value = (target - low) / (high - low), (values[t] - low) / (high - low)
                    total, count = total - share * value.log() - (1 - share) * (1 - value).log(), count + 1
                    continue
                error = (values[t] - target) ** 2
                if self.args.critic_clip_range is not None:
                    limit = self.args.critic_clip_range
                    error = torch.maximum(error, (old + (values[t] - old).clamp(-limit, limit) - target) ** 2)
                total, count = total + 0.5 * error, count + 1
        return total / count

    def step(self, samples, credit):
        """One update of both networks; returns the losses before it."""
        policy_loss, critic_loss = self.policy_loss(samples, credit), self.critic_loss(samples, credit)
        policy_loss.backward()
        critic_loss.backward()
        norms = []
        for network in (self.policy, self.critic):
            norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item())
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter -= self.args.learning_rate * parameter.grad
        self.optimizer.step()
        self.policy.zero_grad()
        self.critic.zero_grad()
        return {"critic_loss": critic_loss.item(), "policy_norm": norms[0], "critic_norm": norms[1]}
