"""What a generative critic has said about completions, as tensors, as metrics and as a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from .packed import CriticQuery


@dataclass
class Reading:
    """
    What the critic has said about one completion.

    Args:
        query ([`~trl_credit.critics.generative.packed.CriticQuery`]):
            What it was asked.
        texts (`list[str]`):
            The completion's K segments, each of which begins with a state.
        ends (`list[int]`):
            The number of tokens up to the end of each of them.
        start (`int`, *optional*, defaults to `0`):
            The number of tokens before the first of them.
        answers (`list[list[int]]`):
            Token ids of the critic's answer about each segment's state; none for a state that leaves no room.
        scores (`list[float]`):
            The value in each answer, `None` where there is none.
        weights (`list[float]`):
            Factor of each answer's log-probability in the critic's loss.
        updates (`int`, *optional*, defaults to `0`):
            Number of updates the critic had had when it answered.
    """

    query: CriticQuery
    texts: list[str]
    ends: list[int]
    start: int = 0
    answers: list[list[int]] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    updates: int = 0

    @property
    def starts(self) -> list[int]:
        """The completion's tokens before each state."""
        return [self.start, *self.ends[:-1]][: len(self.ends)]


def value_of_each_state(readings: Sequence[Reading | None], length: int) -> torch.Tensor:
    """
    Values of B completions where they hold: each from the state that was asked about to the next one.

    Args:
        readings (`Sequence[Reading]`):
            `None` for a completion that the critic was not asked about.
        length (`int`):
            T, tokens of the longest completion.

    Returns:
        `torch.Tensor`: `(B, T + 1)`, float32, NaN where the critic gave no value.
    """
    values = torch.full((len(readings), length + 1), torch.nan)
    for row, reading in enumerate(readings):
        if reading is None or not reading.ends:
            continue
        bounds = [*reading.starts, reading.ends[-1] + 1]  # the last one holds at the end, too
        for score, (start, end) in zip(reading.scores, pairwise(bounds), strict=True):
            values[row, start:end] = torch.nan if score is None else score
    return values


def with_stand_ins(values: torch.Tensor, otherwise: float) -> torch.Tensor:
    """
    Values with a number in each state: where the critic gave none, that of the state before it, so that nothing seems
    to change from that one to this; if no state before it has one, `otherwise`.

    Args:
        values (`torch.Tensor`):
            Of the states of B completions, shape `(B, K)`, NaN where there is none.
        otherwise (`float`):
            E.g. the running mean of values.
    """
    places = torch.arange(values.shape[1], device=values.device)
    last = torch.where(values.isnan(), -1, places).cummax(1).values
    return torch.where(last < 0, otherwise, values.gather(1, last.clamp(min=0)))


def as_tensors(readings: Sequence[Reading | None], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Values of all states of B completions.

    Args:
        readings (`Sequence[Reading]`):
            `None` for a completion that the critic was not asked about.
        device:
            Where the tensors go.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Of shape `(B, K)`: values, NaN where the critic gave none;
        which are states, boolean; which of them it was asked about, boolean.
    """
    shape = (len(readings), max((len(reading.ends) for reading in readings if reading is not None), default=1))
    values = torch.full(shape, torch.nan)
    states, asked = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    for row, reading in enumerate(readings):
        if reading is None:
            continue
        number = len(reading.ends)
        values[row, :number] = torch.tensor([torch.nan if score is None else score for score in reading.scores])
        states[row, :number] = True
        asked[row, :number] = torch.tensor([len(answer) > 0 for answer in reading.answers])
    return values.to(device), states.to(device), asked.to(device)


def correlation(
    x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """
    Pearson's, of what is masked on all processes; NaN where either does not vary.

    Args:
        x, y, mask (`torch.Tensor`):
            Of one shape.
        total (`Callable`):
            The sum of a tensor over processes.
    """
    x, y = x[mask].double(), y[mask].double()
    n, x_sum, y_sum, xx, yy, xy = total(torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y]).sum(1)).tolist()
    n = max(n, 1)
    spread = (xx - x_sum * x_sum / n) * (yy - y_sum * y_sum / n)
    return (xy - x_sum * y_sum / n) / spread**0.5 if spread > 1e-12 else float("nan")


def answer_means(readings: Sequence[Reading], ends: Sequence[int]) -> dict[str, tuple]:
    """
    Sums and counts of what the critic has written, for [`~trl_credit.seam.CreditTrainer.log_means`].

    Args:
        readings (`Sequence[Reading]`):
            Of the completions that it was asked about.
        ends (`Sequence[int]`):
            Tokens that end an answer.
    """
    answers = [answer for reading in readings for answer in reading.answers if answer]
    return {
        "answer_length": (sum(map(len, answers)), len(answers)),
        "cut_off_answers": (sum(answer[-1] not in ends for answer in answers), len(answers)),
    }


def table_rows(
    readings: Sequence[Reading | None],
    advantages: torch.Tensor,
    segments: torch.Tensor,
    decode: Callable[[list[list[int]]], list[str]],
) -> list[list[dict]]:
    """
    The segments of each completion with what the critic said before them: `start` and `end` (tokens), `text`, `read`,
    whether its answer gave a value, `value`, `None` if not, `advantage`, `reasoning`.

    Args:
        readings (`Sequence[Reading]`):
            `None` for a completion that the critic was not asked about.
        advantages, segments (`torch.Tensor`):
            Of the tokens: advantage and segment, shape `(B, T)`.
        decode (`Callable`):
            From answers to texts.
    """
    rows: list[list[dict]] = []
    for row, reading in enumerate(readings):
        rows.append([])
        if reading is None:
            continue
        advantage = dict(zip(segments[row].tolist(), advantages[row].tolist(), strict=True))
        for k, (text, reasoning) in enumerate(zip(reading.texts, decode(reading.answers), strict=True)):
            rows[-1].append(
                {
                    "start": reading.starts[k],
                    "end": reading.ends[k],
                    "text": text,
                    "read": reading.scores[k] is not None,
                    "value": reading.scores[k],
                    "advantage": advantage.get(k, 0.0),
                    "reasoning": reasoning,
                }
            )
    return rows


def as_text(rows: Sequence[dict]) -> str:
    """The segments of a completion, of [`table_rows`], for people: the completions table shows no lists of `dict`."""
    return "\n\n".join(
        f"{row['start']}–{row['end']}: "
        + (f"value {row['value']:.2f}" if row["read"] else "not read")
        + f", advantage {row['advantage']:+.2f}\n{row['text']}\n⟨{row['reasoning'].strip()}⟩"
        for row in rows
    )
