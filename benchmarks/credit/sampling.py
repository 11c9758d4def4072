"""Completions of a small model, many at a time and with a random generator of their own."""

import torch


@torch.no_grad()
def sample(model, prompts: torch.Tensor, mask: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """
    Completions at temperature 1.

    Args:
        model (`PreTrainedModel`):
            The policy.
        prompts (`torch.Tensor`):
            Token ids, padded on the left, shape `(B, P)`.
        mask (`torch.Tensor`):
            Their attention mask, shape `(B, P)`.
        length (`int`):
            Tokens to sample, T.
        generator (`torch.Generator`):
            Where the random numbers come from; training's are left alone.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, padding after an end of sequence.
    """
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    training = model.training
    model.eval()
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    tokens, inputs, cache = [], prompts, None
    for _ in range(length):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        outputs = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = outputs.past_key_values
        # One random number a row; `torch.multinomial` draws one for each word.
        shares = outputs.logits[:, -1].float().softmax(-1).cumsum(-1)
        drawn = torch.rand(len(shares), 1, generator=generator) * shares[:, -1:]
        token = torch.searchsorted(shares, drawn, right=True).squeeze(1).clamp(max=shares.shape[1] - 1)
        token = torch.where(ended, pad, token)
        tokens.append(token)
        ended = ended | (token == eos)
        if ended.all():
            break
        inputs = token.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    model.train(training)
    completions = torch.stack(tokens, dim=1)
    return torch.nn.functional.pad(completions, (0, length - completions.shape[1]), value=pad)
