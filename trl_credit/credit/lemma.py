"""How far the start-state value that GRPO uses can be from the value of a later state (GRPO-λ, Lemma 1)."""

import torch


def value_gap_bound(eos_prob: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Bound of Lemma 1 in GRPO-λ (arXiv:2510.00194):
    \\( V(s_0) - V(s_t) \le 1 - \prod_{k<t} (1 - \pi(\text{EOS} \mid s_k)) \\), for rewards in {0, 1}.

    It is the probability that the policy would have ended its answer before step t, on the states of this completion.
    The authors do not use it in the advantage, and neither do we: it is a diagnostic.

    Args:
        eos_prob (`torch.Tensor`):
            Probability of ending the completion at each state, shape `(B, T)`.
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`; at other tokens the policy made no choice.

    Returns:
        `torch.Tensor`: The bound at each token's state, shape `(B, T)`, float32 in [0, 1]; 0 at the first token.
    """
    log_continue = torch.log1p(-eos_prob.float().clamp(0, 1)) * mask
    # Exclusive product: the state of token t is reached by continuing at all tokens before it. (0 · -inf is 0 here.)
    before = torch.nan_to_num(log_continue, nan=0.0, neginf=-1e4).roll(1, dims=-1)
    if before.shape[-1]:
        before[:, 0] = 0
    return 1 - torch.exp(before.cumsum(-1))
