"""What a report comes to: does the critic know anything, at which λ is it safe, and what to do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .statistics import Figure


# A correlation that is lower by less than this is not worse.
MARGIN = 0.02
# Of answers: more than this share unread, and the critic is to be repaired before anything else.
MAX_UNREAD = 0.1
# Of a difference: less than this is what rounding leaves of a critic that does not vary.
_DUST = 1e-6
_KNOWLEDGE = ("difference_seen", "explained_variance")


@dataclass
class Verdict:
    """
    The answer that comes before the tables, by rules on intervals.

    Args:
        knows (`str`):
            `"steps"`: its values rise with the true ones within prompts, beyond doubt. `"prompts"`: not within them,
            but over all states. `"nothing"`: neither. `"nothing read"`: no answer of it could be read. `"untold"`:
            the true values do not vary, or there is one prompt only.
        safe_lambdas (`list[float]`):
            Those of the grid at which its advantages are at least as right as without a critic, beyond doubt.
        harmful_lambdas (`list[float]`):
            Those at which they are less right, beyond doubt.
        best_lambda (`float`):
            The safe one with the highest correlation, if there is one.
        sentences (`list[str]`):
            All of it in words.
    """

    knows: str
    safe_lambdas: list[float]
    harmful_lambdas: list[float]
    best_lambda: float | None
    sentences: list[str]


def judge(
    rows: Mapping[str, Figure], curves: Mapping[str, Sequence[tuple[float, Figure]]], reference: Figure
) -> Verdict:
    """
    The verdict on a critic.

    Args:
        rows, curves:
            Of its [`CriticReport`].
        reference ([`Figure`]):
            Correlation of the advantages that need no critic with the true ones, over the same steps as the gains.
    """
    unread = rows["answers/unread"].estimate
    if unread == 1:
        return Verdict(
            "nothing read",
            [],
            [],
            None,
            [
                "None of this critic's answers could be read: nothing is known of what it knows, no figure is of it.",
                "Do not train with it. Read some of its answers: are they cut off, or of another form? Teach it the "
                "form first, or give it more tokens.",
            ],
        )
    knows = _knows(rows)
    gains = curves["advantage/gain_by_lambda"]
    safe = [lam for lam, gain in gains if gain.low > -MARGIN and (knows == "steps" or lam == 1)]
    harmful = [lam for lam, gain in gains if gain.high < 0]
    best = max(safe, key=lambda lam: dict(gains)[lam].estimate) if safe else None
    sentences = [_of_knowledge(knows, rows), _of_lambdas(gains, safe, harmful, reference)]
    if unread > 0:
        sentences.append(f"{100 * unread:.0f} % of its answers could not be read; those states are in no other figure.")
    sentences.append(_to_do(knows, unread, safe, best, dict(gains), reference))
    return Verdict(knows, safe, harmful, best, sentences)


def _knows(rows: Mapping[str, Figure]) -> str:
    within, overall = rows["error/difference_seen_within_prompt"], rows["error/difference_seen"]
    if math.isnan(within.low) and math.isnan(overall.low):
        return "untold"
    if within.low > _DUST:
        return "steps"
    return "prompts" if overall.low > _DUST else "nothing"


def _of_knowledge(knows: str, rows: Mapping[str, Figure]) -> str:
    seen, explained = ([_text(rows[f"error/{name}{of}"]) for of in ("_within_prompt", "")] for name in _KNOWLEDGE)
    inside = f"between states of one prompt it sees {seen[0]} of a true difference"
    if knows == "steps":
        text = f"This critic knows more than the prompt: {inside}, and explains {explained[0]} of the variance."
        if rows["error/explained_variance_within_prompt"].high < 0:
            text += " But its values are so noisy or so far off that the prompt's mean would be nearer to the truth."
        return text
    if knows == "prompts":
        return f"This critic knows nothing beyond the prompt: {inside}, between all states {seen[1]}."
    if knows == "nothing":
        return f"This critic knows nothing, not even which prompts are hard: {inside}, between all states {seen[1]}."
    return "What this critic knows cannot be told: the true values do not vary enough, or there is one prompt only."


def _of_lambdas(gains: Sequence[tuple[float, Figure]], safe: list[float], harmful: list[float], reference) -> str:
    if all(math.isnan(gain.estimate) for _, gain in gains):
        return "At which λ it is safe cannot be told: the true advantages, or the rewards, do not vary enough."
    grid = [lam for lam, _ in gains]
    if safe and safe == grid[-len(safe) :]:
        text = f"Safe from λ = {safe[0]:g} on" if len(safe) < len(grid) else "Safe at every λ"
        text = "Safe at λ = 1 alone" if safe == [1.0] else text
    elif safe:
        text = f"Safe at λ = {_listed(safe)}"
    else:
        text = "Safe at no λ"
    text += (
        f": {'there ' if safe else 'nowhere '}its advantages are{'' if safe else ' surely'} as close to the true ones "
        f"as those without a critic, whose correlation is {reference.estimate:.2f}, or closer.".replace("-", "−")
    )
    return f"{text} Harmful at λ = {_listed(harmful)}." if harmful else text


def _to_do(knows: str, unread: float, safe: list[float], best: float | None, gains, reference: Figure) -> str:
    if unread > MAX_UNREAD:
        return "To do: first make its answers readable, by teaching it the form or giving it more tokens."
    if knows == "steps" and best is not None:
        return (
            f"To do: train with λ = {best:g}, where the correlation with the true advantages is "
            f"{reference.estimate + gains[best].estimate:.2f}; it is {reference.estimate:.2f} without a critic."
        ).replace("-", "−")
    if knows == "steps":
        return "To do: train the critic longer, or measure it on more prompts, before its λ is trusted."
    if knows == "prompts" and 1.0 in safe:
        return "To do: use it at λ = 1 alone, as a baseline of the prompt; for credit of steps it has to learn more."
    if knows == "untold":
        return "To do: measure on prompts that the policy sometimes solves and sometimes does not."
    return "To do: train without it, or train the critic longer on this policy's completions and measure again."


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{x:g}" for x in numbers)


def _text(figure: Figure) -> str:
    return f"{figure.estimate + 0.0:.2f} [{figure.low + 0.0:.2f}, {figure.high + 0.0:.2f}]".replace("-", "−")
