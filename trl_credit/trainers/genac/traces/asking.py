"""Ask an oracle about each state once, and lose no answer."""

import logging
import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from ....journal import Journal
from .oracle import Answer, OracleError, Refused, State, Unavailable


logger = logging.getLogger(__name__)

# With no answer between them, so many refusals are not about the queries.
_REFUSALS_IN_A_ROW = 8
_LONGEST_PAUSE = 60.0


def ask_all(
    oracle: Callable[[State], Answer],
    states: Iterable[State],
    journal: Journal,
    *,
    concurrency: int = 1,
    retries: int = 8,
    pause: float = 1.0,
    on_answer: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """
    Ask about the states that the journal has no answer for, and write down each answer as it arrives.

    When the oracle is out of reach or fails, nothing more is asked, but the answers that are under way are waited for
    and kept: the same call goes on from there.

    Args:
        oracle (`Callable`):
            From a [`State`] to an [`Answer`].
        states (`Iterable[State]`):
            What to ask about, each query once.
        journal ([`Journal`]):
            Rows with `query`, `trace`, `cut_off` and `usage`.
        concurrency (`int`, *optional*, defaults to `1`):
            How many are asked at a time.
        retries (`int`, *optional*, defaults to `8`):
            How often the same is asked again while the oracle is [`Unavailable`].
        pause (`float`, *optional*, defaults to `1.0`):
            Seconds before the first of these, twice that before the second and so on up to a minute, half of it by
            chance; or what the oracle says.
        on_answer (`Callable`, *optional*):
            Called after each answer.

    Returns:
        `dict[str, str]`: What the oracle refused to answer, and why. It is asked again the next time.

    Raises:
        OracleError: When the oracle cannot be asked; what else it raises passes through.
    """
    answered = {row["query"] for row in journal.rows()}
    waiting = iter([state for state in {s.query: s for s in states}.values() if state.query not in answered])
    stop = threading.Event()
    refused: dict[str, str] = {}
    in_a_row = 0
    failure: BaseException | None = None
    under_way: dict[Future, State] = {}

    def write_down(future: Future) -> None:
        nonlocal in_a_row, failure
        state = under_way.pop(future)
        try:
            answer = future.result()
        except Refused as refusal:
            refused[state.query] = str(refusal)
            logger.warning("The oracle refused a query: %s", refusal)
            in_a_row += 1
            if in_a_row == _REFUSALS_IN_A_ROW:
                raise OracleError(
                    f"the oracle refused {in_a_row} queries in a row, the last one with: {refusal}"
                ) from None
            return
        in_a_row = 0
        journal.append({"query": state.query, "trace": answer.trace, "cut_off": answer.cut_off, "usage": answer.usage})
        on_answer()

    with ThreadPoolExecutor(concurrency) as pool:
        while True:
            try:
                while failure is None and len(under_way) < concurrency and (state := next(waiting, None)) is not None:
                    under_way[pool.submit(_ask, oracle, state, retries, pause, stop)] = state
                if not under_way:
                    break
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    write_down(future)
            except BaseException as error:  # noqa: B036 - an interrupt too waits for what is under way
                stop.set()
                failure = failure or error
    if failure is not None:
        raise failure
    return refused


def _ask(oracle, state: State, retries: int, pause: float, stop: threading.Event) -> Answer:
    for attempt in range(retries + 1):
        try:
            return oracle(state)
        except Unavailable as error:
            if attempt == retries or stop.is_set():
                raise
            seconds = max(min(pause * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0), error.retry_after)
            logger.warning("The oracle is out of reach (%s); asked again in %.1f s.", error, seconds)
            if stop.wait(seconds):
                raise
    raise AssertionError("unreachable")
