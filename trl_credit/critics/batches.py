"""Which sequences a critic reads together: with little padding, and with the same work for every process."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .critic import Runner


# Tokens of padding for each real one, at most.
MOST_PADDING = 0.1


def shares_of_batches(lengths: list[int], max_tokens: int, processes: int = 1) -> list[list[torch.Tensor]]:
    """
    Divide sequences into batches, the longest first, and each batch among processes.

    A batch takes the next shorter sequences as long as a process's part of it stays within `max_tokens`, padding
    included, and there is no more padding than [`MOST_PADDING`] allows, all longer sequences considered.

    Args:
        lengths (`list[int]`):
            Tokens of each sequence.
        max_tokens (`int`):
            Of a process's part of a batch. A longer sequence has a batch of its own.
        processes (`int`, *optional*, defaults to `1`):
            Among how many to divide them.

    Returns:
        `list[list[torch.Tensor]]`: For each process the indices of its part of every batch: as many batches for each,
        of as many sequences and about the same length. Where numbers do not divide, a negative index, that of the
        shortest sequence counted from the end, keeps a process in step.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    order += [order[-1] - len(order)] * (-len(order) % processes) if order else []
    batches: list[list[list[int]]] = []
    padding = real = 0
    for at in range(0, len(order), processes):
        one_each = order[at : at + processes]
        tokens = sum(lengths[i] for i in one_each)
        real += tokens
        if batches:
            longest = lengths[batches[-1][0][0]]
            with_it = padding + longest * processes - tokens
            if (len(batches[-1]) + 1) * longest <= max_tokens and with_it <= MOST_PADDING * real:
                batches[-1].append(one_each)
                padding = with_it
                continue
        batches.append([one_each])
    return [[torch.tensor([part[p] for part in batch]) for batch in batches] for p in range(processes)]


def evaluate_evenly(
    runner: Runner, lengths: list[int], max_tokens: int, read: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """
    What a network puts out for sequences that all processes have, each of which is read on one of them.

    Args:
        runner ([`~trl_credit.critics.critic.Runner`]):
            What runs the network.
        lengths (`list[int]`):
            Tokens of each of N sequences, the same on every process.
        max_tokens (`int`):
            See [`shares_of_batches`].
        read (`Callable`):
            `read(network, index=index)`, the outputs for some of them, of one shape for each.

    Returns:
        `torch.Tensor`: The N outputs, on every process.
    """
    shares = shares_of_batches(lengths, max_tokens, runner.num_processes)
    own = [runner.evaluate(partial(read, index=index)) for index in shares[runner.process_index]]
    outputs = runner.gather(torch.cat(own))
    order = torch.cat([index for share in shares for index in share])
    found = torch.empty_like(outputs[: len(lengths)])
    found[order.to(found.device)] = outputs
    return found


def gather_rows(runner: Runner, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rows of all processes, on every process.

    Args:
        runner ([`~trl_credit.critics.critic.Runner`]):
            What knows of the processes.
        rows (`dict[str, torch.Tensor]`):
            Shapes `(B, ...)`, with one B on every process. What is narrower than elsewhere is filled up with zeros at
            the end.
    """
    if runner.num_processes == 1:
        return rows
    tables = [name for name, x in rows.items() if x.dim() > 1]
    own = torch.tensor([[rows[name].shape[1] for name in tables]], device=rows[tables[0]].device)
    widest = dict(zip(tables, runner.gather(own).amax(0).tolist(), strict=True))
    return {
        name: runner.gather(F.pad(x, (0, widest[name] - x.shape[1])) if name in widest else x)
        for name, x in rows.items()
    }
