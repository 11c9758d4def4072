"""At which states of a completion a critic is asked: those between segments, or those where much is undecided."""

import torch


def segment_starts(segments: torch.Tensor) -> torch.Tensor:
    """
    The first token of each segment.

    Args:
        segments (`torch.Tensor`):
            Segment of each trained token, shape `(B, T)`, -1 elsewhere, see
            [`~trl_credit.credit.segment_gae.segment_of_token`].

    Returns:
        `torch.Tensor`: Shape `(B, T)`, boolean. The state before such a token is a boundary.
    """
    latest = torch.cummax(segments, dim=1).values
    before = torch.cat([segments.new_full((len(segments), 1), -1), latest[:, :-1]], dim=1)
    return segments > before


def first_tokens(mask: torch.Tensor) -> torch.Tensor:
    """
    The first token of each row, whoever wrote it: the state before it is the end of the prompt.

    Args:
        mask (`torch.Tensor`):
            Shape `(B, T)`.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, boolean.
    """
    return (torch.arange(mask.shape[1], device=mask.device) == 0).expand(mask.shape)


def turn_starts(mask: torch.Tensor) -> torch.Tensor:
    """
    The first token of each turn of the policy: the first trained one of a row, and those after what others wrote.

    Args:
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, boolean.
    """
    mask = mask.bool()
    return mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]


def turn_ends(mask: torch.Tensor) -> torch.Tensor:
    """
    The last token of each turn of the policy.

    Args:
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, boolean.
    """
    return turn_starts(mask.flip(1)).flip(1)


def held(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """
    What is known at the starts of segments, for every token up to the next one.

    Args:
        x (`torch.Tensor`):
            Shape `(B, T)`.
        starts (`torch.Tensor`):
            Boolean, shape `(B, T)`.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, NaN before the first start of a row.
    """
    columns = torch.arange(x.shape[1], device=x.device)
    latest = torch.where(starts, columns, -1).cummax(1).values
    return torch.where(latest < 0, torch.nan, x.gather(1, latest.clamp(min=0)))


def uncertain_starts(entropy: torch.Tensor, mask: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    The first trained token of each row, and every one whose choice was more open than `threshold`.

    Args:
        entropy (`torch.Tensor`):
            Entropy of the distribution that each token was drawn from, shape `(B, T)`.
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`.
        threshold (`float`):
            In nats, e.g. a running quantile of the entropies.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, boolean.
    """
    mask = mask.bool()
    first = mask & (mask.cumsum(1) == 1)
    return first | (mask & (entropy > threshold))


def segments_of_starts(starts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Segments from where they start, the inverse of [`segment_starts`].

    Args:
        starts (`torch.Tensor`):
            Boolean, shape `(B, T)`; the first trained token of each row among them.
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`.

    Returns:
        `torch.Tensor`: Segment of each trained token, int64 of shape `(B, T)`, -1 elsewhere.
    """
    mask = mask.bool()
    segments = (starts & mask).cumsum(1) - 1
    if (segments[mask] < 0).any():
        raise ValueError("segments_of_starts: the first trained token of each row must start a segment.")
    return torch.where(mask, segments, -1)


def position_features(starts: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """
    What the place of a state tells: how far into the completion it is, and in which segment.

    Args:
        starts (`torch.Tensor`):
            Where segments start, boolean, shape `(B, T)`.
        mask (`torch.Tensor`):
            Trained tokens, shape `(B, T)`.
        length (`int`):
            Most tokens of a completion.

    Returns:
        `torch.Tensor`: `(B, T, 3)`, float32: trained tokens so far over `length`; the same as log(1 + n) over
        log(1 + `length`), which tells early states apart; and segments so far over `length`.
    """
    mask = mask.bool()
    so_far = (mask.cumsum(1) - mask.int()).float()
    segment = ((starts & mask).cumsum(1) - 1).clamp(min=0).float()
    scale = torch.log1p(torch.tensor(float(length), device=mask.device))
    return torch.stack([so_far / length, torch.log1p(so_far) / scale, segment / length], dim=-1)
