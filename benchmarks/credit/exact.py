"""Values of states under a policy: by the task's program, or by going on from them many times."""

import torch

from .sampling import sample
from .walks import WalkTask


@torch.no_grad()
def transitions(model, task: WalkTask) -> torch.Tensor:
    """
    Probability of a step from each symbol to each, shape `(N, N)`, as the policy takes the first step of a walk.

    That it steps alike later on is an assumption, which its teacher meets; `tests/test_benchmark_credit.py` compares
    what follows from it with walks.
    """
    contexts = task.contexts()
    training = model.training
    model.eval()
    logits = [model(part, logits_to_keep=1).logits[:, -1].float() for part in contexts.split(512)]
    model.train(training)
    return torch.cat(logits).softmax(-1)[:, : task.symbols]


def exact_values(model, task: WalkTask, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    """Values under the policy as it is of the states before each token and after the last, shape `(B, T + 1)`."""
    return task.values(transitions(model, task), prompts, completions)


@torch.no_grad()
def monte_carlo_values(
    model, task, prompts: torch.Tensor, completions: torch.Tensor, continuations: int, generator: torch.Generator
) -> tuple[torch.Tensor, int]:
    """
    Mean rewards of continuations from the state before each token and after the last.

    Args:
        model (`PreTrainedModel`):
            The policy.
        task:
            Whose rewards they earn.
        prompts, completions (`torch.Tensor`):
            Shape `(B, P)` and `(B, T)`.
        continuations (`int`):
            From each state.
        generator (`torch.Generator`):
            Where the random numbers come from.

    Returns:
        `tuple[torch.Tensor, int]`: Values, shape `(B, T + 1)`, and the tokens that were generated for them.
    """
    pad = model.config.pad_token_id
    values, tokens = [], 0
    for at in range(completions.shape[1] + 1):
        left = task.completion_length - at
        context = torch.cat([prompts, completions[:, :at]], dim=1)
        if left > 0:
            ended = (completions[:, :at] == model.config.eos_token_id).any(1)
            repeated = context.repeat_interleave(continuations, 0)
            further = sample(model, repeated, (repeated != pad).long(), left, generator)
            further[ended.repeat_interleave(continuations)] = pad
            whole = torch.cat([repeated[:, prompts.shape[1] :], further], dim=1)
            tokens += int((further != pad).sum())
        else:
            whole = completions.repeat_interleave(continuations, 0)
        rewards = task.rewards(prompts.repeat_interleave(continuations, 0), whole)
        values.append(rewards.view(-1, continuations).mean(1))
    return torch.stack(values, dim=1), tokens
