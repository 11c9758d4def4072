"""What a policy earns on fresh prompts, how far it is from where it started, and whether its counts are true."""

import torch

from trl_credit.credit.fit import explained_variance, fit_sums

from .exact import exact_values
from .sampling import sample
from .walks import WalkTask


class Evaluation:
    """
    Scores policies of one run, all on the same prompts, which no training sees the draw of.

    Args:
        task:
            The task.
        start (`PreTrainedModel`):
            The start policy.
        prompts (`int`):
            How many.
        seed (`int`):
            Of the prompts and of the sampling.
    """

    def __init__(self, task, start, prompts: int, seed: int):
        self.task = task
        self.start = start.eval()
        self.prompts = task.prompts(prompts, torch.Generator().manual_seed(30_000 + seed), held_out=True)
        self.generator = torch.Generator().manual_seed(40_000 + seed)

    @torch.no_grad()
    def __call__(self, model) -> dict:
        """
        `reward` with its standard error, `kl` to the start policy in nats per completion, `truth` of the counts, and
        the `ceiling` of the explained variance: how much of the rewards the exact values explain, over all states.
        """
        mask = (self.prompts != model.config.pad_token_id).long()
        completions = sample(model, self.prompts, mask, self.task.completion_length, self.generator)
        rewards = self.task.rewards(self.prompts, completions)
        scores = {
            "reward": rewards.mean().item(),
            "reward_error": (rewards.std() / len(rewards) ** 0.5).item(),
            "kl": self._kl(model, completions),
            "completion_length": (completions != model.config.pad_token_id).sum(1).float().mean().item(),
        }
        if isinstance(self.task, WalkTask):
            if self.task.counts:
                scores["truth"] = self.task.truth(self.prompts, completions).float().mean().item()
            values = exact_values(model, self.task, self.prompts, completions)[:, :-1]
            returns = rewards.unsqueeze(1).expand_as(values)
            scores["ceiling"] = explained_variance(fit_sums(values, returns, torch.ones_like(values)))
        return scores

    def _kl(self, model, completions: torch.Tensor, rows: int = 256) -> float:
        """Mean of log π - log π_start over the policy's own completions, in nats for each."""
        ids = torch.cat([self.prompts, completions], dim=1)[:rows]
        pad = model.config.pad_token_id
        inputs = {"input_ids": ids, "attention_mask": (ids != pad).long(), "logits_to_keep": completions.shape[1] + 1}
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        wanted = completions[:rows].unsqueeze(2)
        training = model.training
        logps = []
        for policy in (model.eval(), self.start):
            logits = policy(**inputs, position_ids=positions).logits[:, :-1]
            logps.append(logits.log_softmax(-1).gather(2, wanted).squeeze(2))
        model.train(training)
        return (((logps[0] - logps[1]) * (completions[:rows] != pad)).sum(1).mean()).item()
