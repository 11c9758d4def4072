"""VinePPO as its paper writes it (arXiv:2410.01679, §4): one completion at a time, loops, float64 numbers of Python."""


def mean(rewards):
    scored = [reward for reward in rewards if reward is not None]
    return sum(scored) / len(scored) if scored else None


def advantages(ends, returns, reward):
    """
    Advantage of each token: the value after its segment less that before it. `returns` are those of the continuations
    from the start of each segment, `reward` is the completion's own, which is what its last state is worth.
    """
    if reward is None:
        return [0.0] * (ends[-1] if ends else 0)
    values = [mean(of_state) for of_state in returns] + [reward]
    out, start = [], 0
    for k, end in enumerate(ends):
        known = values[k] is not None and values[k + 1] is not None
        out += [values[k + 1] - values[k] if known else 0.0] * (end - start)
        start = end
    return out


def standard_error(rewards):
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2:
        return None
    variance = sum((reward - mean(scored)) ** 2 for reward in scored) / (len(scored) - 1)
    return (variance / len(scored)) ** 0.5
