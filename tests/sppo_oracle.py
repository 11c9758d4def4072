"""SPPO written as its paper does: one completion at a time, no padding, no batches, float64."""

import torch
import vapo_oracle
from vapo_oracle import logps


class Oracle(vapo_oracle.Oracle):
    """
    Args:
        policy, critic, args:
            As VAPO's.
        read (`Callable`):
            Tokens that the critic reads of a prompt of the dataset.
    """

    def __init__(self, policy, critic, args, read):
        super().__init__(policy, critic, args)
        self.read = read

    def output(self, prompt):
        """What the critic says at the last token of a prompt."""
        return self.critic(torch.tensor([self.read(prompt)])).logits[0, -1, 0].double()

    def value(self, prompt):
        output = self.output(prompt)
        if self.args.critic_loss == "mse":
            return output
        low, high = (0, 1) if self.args.reward_range == "running" else self.args.reward_range
        return low + (high - low) / (1 + torch.exp(-output))

    def judge(self, samples, prompts):
        """A = R - V for each completion, by the critic as it is now; none where there is no reward."""
        self.prompts = prompts
        with torch.no_grad():
            for sample in samples:
                sample.old_logps = logps(self.policy, sample).tolist()
            values = [self.value(prompt).item() for prompt in prompts]
        return [
            (None if sample.rewards is None else sample.rewards[0] - value, value)
            for sample, value in zip(samples, values, strict=True)
        ]

    def policy_loss(self, samples, credit):
        trained = sum(sum(sample.trained) for sample in samples)  # unscored ones have zero advantages, but count
        surrogate = 0.0
        for sample, (advantage, _) in zip(samples, credit, strict=True):
            if advantage is None:
                continue
            now = logps(self.policy, sample)
            for t in (t for t, is_trained in enumerate(sample.trained) if is_trained):
                ratio = (now[t] - sample.old_logps[t]).exp()
                clipped = ratio.clamp(1 - self.args.epsilon, 1 + self.args.epsilon)
                surrogate = surrogate - torch.minimum(ratio * advantage, clipped * advantage)
        return surrogate / trained

    def critic_loss(self, samples, credit):
        low, high = (0, 1) if self.args.reward_range == "running" else self.args.reward_range
        losses = []
        for sample, prompt in zip(samples, self.prompts, strict=True):
            if sample.rewards is None:
                continue
            (reward,) = sample.rewards
            output = self.output(prompt)
            if self.args.critic_loss == "mse":
                losses.append(0.5 * (output - reward) ** 2)
                continue
            target = (reward - low) / (high - low)
            v = 1 / (1 + torch.exp(-output))
            losses.append(-(target * v.log() + (1 - target) * (1 - v).log()))
        return sum(losses) / len(losses)
