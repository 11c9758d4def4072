"""
Reads completions with numbers per token: from our credit log (parquet), and from JSON lines as other tools write them,
RLLoggingBoard and the rollout dumps of verl among them.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# The folder of a run's tables in its `output_dir`. What begins with `_` is left out when the run is pushed to the Hub:
# tables hold training prompts.
CREDIT_FOLDER = "_credit"
# Earlier versions' name for it.
OLD_CREDIT_FOLDER = "credit"

# What a column may be called elsewhere.
TOKENS = ("tokens", "response_tokens", "completion_tokens")
TOKEN_IDS = ("token_ids", "completion_ids", "response_ids")
TRAINED = ("trained", "response_mask", "loss_mask")
TEXT = ("completion", "response", "output")
PROMPT = ("prompt", "input")
REWARD = ("reward", "score")
STEP = ("step", "global_step")
RIGHT = ("right", "correct", "acc")
OTHER_NAMES = {
    "advantages": "advantage",
    "values": "value",
    "ratios": "ratio",
    "logprobs": "logp",
    "log_probs": "logp",
    "logps": "logp",
    "ref_logprobs": "ref_logp",
    "ref_log_probs": "ref_logp",
    "entropies": "entropy",
    "weights": "weight",
    "token_rewards": "token_reward",
    "returns": "return",
}
# Numbers that belong to tokens, whether a table has one for each or one for all of them.
PER_TOKEN = {"advantage", "value", "ratio", "log_ratio", "logp", "ref_logp", "entropy", "weight", "return"}


class BadTable(ValueError):
    """What was given is not a table of completions."""


@dataclass
class Completion:
    """
    A completion and what each of its tokens was given.

    Args:
        source, method (`str`):
            Where it is from, and the trainer that made it.
        step, row (`int`):
            Optimizer step, and place in the rollout.
        prompt (`str`):
            The prompt's text.
        tokens (`list[str]`):
            The text of each token.
        token_ids (`list[int]`):
            Their ids, or none.
        trained (`list[bool]`):
            Which of them the policy chose and was trained on.
        reward (`float`):
            The sum of rewards; `None` if there is none, as in the next two.
        rewards (`dict[str, float]`):
            Those of each reward function.
        right (`bool`):
            Whether it is right.
        right_by (`str`):
            What says so.
        index (`int`):
            Place among the completions of its prompt in its step.
        columns (`dict[str, list[float]]`):
            Numbers per token by the name of the quantity, `None` where there is none.
        segments (`list[dict]`):
            Parts of it, each with `start` and `end` (tokens), `read`, whether the critic's answer could be read, and
            any of `value`, `advantage` and `reasoning`.
        facts (`dict[str, str]`):
            Everything else that the table says of it.
    """

    source: str
    method: str
    step: int
    row: int
    prompt: str
    tokens: list[str]
    token_ids: list[int]
    trained: list[bool]
    reward: float | None
    rewards: dict[str, float | None]
    right: bool | None
    right_by: str
    index: int
    columns: dict[str, list[float | None]]
    segments: list[dict] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> tuple[str, tuple[str, ...]]:
        """What two completions with the same tokens have in common."""
        return self.prompt, tuple(self.tokens)

    @property
    def place(self) -> tuple[int, str, int]:
        """What two completions of the same step, prompt and place among its completions have in common."""
        return self.step, self.prompt, self.index


@dataclass(frozen=True)
class Right:
    """
    Which completions are right. Without any of these it is the table that says so, if it does.

    Args:
        reward (`str`, *optional*):
            Name of the reward function that decides. Default: the first of the table, or the only reward there is.
        above (`float`, *optional*):
            A completion to which it gives more is right. Default: 0.
    """

    reward: str | None = None
    above: float | None = None


def read_completions(
    path: str | Path,
    limit: int = 64,
    steps: list[int] | None = None,
    right: Right = Right(),
    like: list[Completion] | None = None,
) -> tuple[list[Completion], int]:
    """
    Read completions of a run or table.

    Args:
        path (`str` or `Path`):
            The folder of a run, a folder of tables, or a table: `.parquet` or `.jsonl`.
        limit (`int`, *optional*, defaults to `64`):
            How many at most. Without `steps` they are of as many steps as fit with whole rollouts, evenly spread, the
            last one among them.
        steps (`list[int]`, *optional*):
            Only those of these steps.
        right ([`Right`], *optional*):
            Which completions are right. Default: what the table says.
        like (`list[Completion]`, *optional*):
            Take those of the same step, prompt and place among the prompt's completions as one of these, if there
            are any.

    Returns:
        `tuple[list[Completion], int]`: The completions, and how many there are in all.

    Raises:
        BadTable: The path is none of these, or a row is no completion.
    """
    path = Path(path)
    files = _tables(path)
    where = [(file, step, number) for file in files for number, step in enumerate(_steps(file))]
    if not where:
        raise BadTable(f"{path} holds no completions.")
    counts = Counter(step for _, step, _ in where)
    if steps is not None and (unknown := [step for step in steps if step not in counts]):
        known = sorted(counts)
        raise BadTable(f"{path} has no step {unknown[0]}. It has {len(known)} steps, from {known[0]} to {known[-1]}.")
    in_run = path.name in (CREDIT_FOLDER, OLD_CREDIT_FOLDER)
    source = path.parent.name if in_run else path.stem if path.is_file() else path.name
    if like:
        wanted = {completion.place for completion in like}
        found = [c for c in _read(files, source, right, lambda step, taken: True) if c.place in wanted]
        if found:
            return found[:limit], len(where)
    chosen = set(_spread(counts, limit) if steps is None else steps)
    share = max(1, limit // len(chosen))
    kept = list(_read(files, source, right, lambda step, taken: step in chosen and taken[step] < share))
    return sorted(kept, key=lambda c: (c.step, c.row))[:limit], len(where)


def _spread(counts: Counter, limit: int) -> list[int]:
    known = sorted(counts)
    number = min(len(known), max(1, limit // max(counts.values())))
    if number == 1:
        return known[-1:]
    return [known[round(i * (len(known) - 1) / (number - 1))] for i in range(number)]


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in (".parquet", ".jsonl"):
            raise BadTable(f"{path} is no table: a file that ends in .parquet or .jsonl is needed.")
        return [path]
    if not path.is_dir():
        raise BadTable(f"There is no file or folder {path}.")
    folders = (path / CREDIT_FOLDER, path / OLD_CREDIT_FOLDER, path)
    folder = next(folder for folder in folders if folder.is_dir())
    files = [file for file in folder.iterdir() if file.suffix in (".parquet", ".jsonl")]
    if not files:
        raise BadTable(
            f"{path} has neither a folder {CREDIT_FOLDER!r} with tables nor tables (.parquet, .jsonl) of its own. A "
            "run writes them with `log_credit=True`."
        )
    return sorted(files, key=lambda file: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", file.name)])


def _rows(file: Path, columns: list[str] | None = None) -> Iterator[dict]:
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(file)
            names = (
                table.schema_arrow.names if columns is None else [n for n in columns if n in table.schema_arrow.names]
            )
            for batch in table.iter_batches(batch_size=16, columns=names):
                yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise BadTable(f"{file} is no parquet file: {error}") from error
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadTable(f"Line {number} of {file} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise BadTable(f"Line {number} of {file} is no JSON object, but {type(row).__name__}.")
            yield row


def _steps(file: Path) -> Iterator[int]:
    """The step of each row."""
    columns = None
    if file.suffix == ".parquet":
        table = _parquet(file)
        columns = [name for name in STEP if name in table.schema_arrow.names]
        if not columns:
            yield from [_step_of({}, file)] * table.metadata.num_rows
            return
    for row in _rows(file, columns):
        yield _step_of(row, file)


def _parquet(file: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise BadTable(f"{file} is no parquet file: {error}") from error


def _step_of(row: dict, file: Path) -> int:
    step = _first(row, STEP)
    if step is None and file.stem.isdigit():  # verl names its files by the step
        step = int(file.stem)
    if step is None:
        return 0
    if isinstance(step, bool) or not isinstance(step, (int, float)) or step != step or abs(step) > 2**53:
        raise BadTable(f"The step of a row of {file} is {step!r:.80}, not a number.")
    return int(step)


def _read(files: list[Path], source: str, right: Right, wanted) -> Iterator[Completion]:
    taken: Counter = Counter()
    of_prompt: Counter = Counter()
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            step = _step_of(row, file)
            asked = step, _plain(_first(row, PROMPT) or "")
            if wanted(step, taken):
                yield _completion(
                    row, f"Row {number} of {file}", source, step, taken[step], index=of_prompt[asked], right=right
                )
            taken[step] += 1
            of_prompt[asked] += 1


def _first(row: dict, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _completion(row: dict, where: str, source: str, step: int, number: int, index: int, right: Right) -> Completion:
    tokens = _first(row, TOKENS)
    if tokens is None:
        text = _first(row, TEXT)
        if text is None:
            raise BadTable(
                f"{where} has no tokens (a column {_either(TOKENS)}) and no text ({_either(TEXT)}). Its columns are "
                f"{', '.join(map(repr, row)) or 'none'}."
            )
        tokens = re.findall(r"\s*\S+|\s+$", _plain(text))  # words, for want of anything better
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise BadTable(f"The tokens of {where[0].lower() + where[1:]} are not a list of texts.")
    names = set(TOKENS + TEXT + PROMPT + REWARD + STEP + RIGHT + ("right_by", "method", "row", "rewards", "segments"))
    columns: dict[str, list[float | None]] = {}
    facts: dict[str, str] = {}
    mask = _first(row, TRAINED)
    trained = [bool(x) for x in mask[: len(tokens)]] if isinstance(mask, list) else [True] * len(tokens)
    trained += [False] * (len(tokens) - len(trained))
    ids: list[int] = []
    for name, value in row.items():
        known = OTHER_NAMES.get(name, name)
        if name in names or name in TRAINED or value is None:
            continue
        numbers = isinstance(value, list) and all(x is None or isinstance(x, (int, float)) for x in value)
        if name in TOKEN_IDS and numbers:
            ids = value if len(value) == len(tokens) else []
        elif numbers and (len(value) == len(tokens) or known in PER_TOKEN | {"token_reward"}):
            columns[known] = _on_tokens(known, value, len(tokens), _first(row, TOKENS) is not None, where)
        elif known in PER_TOKEN and isinstance(value, (int, float)):
            columns[known] = [_finite(value) if is_trained else None for is_trained in trained]
        else:
            facts[name] = _plain(value)
    if "log_ratio" in columns and "ratio" not in columns:
        columns["ratio"] = [None if x is None else _finite(math.exp(min(x, 700))) for x in columns.pop("log_ratio")]
    reward = _first(row, REWARD)
    reward = _finite(reward) if isinstance(reward, (int, float)) else None
    rewards = {n: _finite(x) for n, x in row["rewards"].items()} if isinstance(row.get("rewards"), dict) else {}
    segments = _segments(row.get("segments"), len(tokens), where)
    for segment in segments:
        if "value" in columns and not segment["read"]:  # what stands there is no answer of the critic's
            columns["value"][segment["start"] : segment["end"]] = [None] * (segment["end"] - segment["start"])
    if "value" in columns and "value_change" not in columns:
        columns["value_change"] = value_changes(columns["value"], trained, segments, reward)
    is_right, right_by = _is_right(row, reward, rewards, right, where)
    return Completion(
        source=source,
        method=str(row.get("method") or source),
        step=step,
        row=row["row"] if isinstance(row.get("row"), int) else number,
        prompt=_plain(_first(row, PROMPT) or ""),
        tokens=tokens,
        token_ids=ids,
        trained=trained,
        reward=reward,
        rewards=rewards,
        right=is_right,
        right_by=right_by,
        index=index,
        columns={name: column for name, column in columns.items() if any(x is not None for x in column)},
        segments=segments,
        facts=facts,
    )


def _is_right(row: dict, reward, rewards: dict, right: Right, where: str) -> tuple[bool | None, str]:
    """Whether a completion is right, and what says so."""
    if right == Right():
        for name in RIGHT:
            if isinstance(row.get(name), (int, float)):
                return row[name] > 0, row.get("right_by") or f"the table's column {name!r}"
        if row.get("right_by"):  # the run knew no score of it
            return None, row["right_by"]
    if right.reward is not None and right.reward not in rewards:
        raise BadTable(
            f"{where} has no reward of {right.reward!r}. Its reward functions are "
            f"{', '.join(map(repr, rewards)) or 'not named: it has their sum alone'}."
        )
    if rewards:
        name = right.reward or next(iter(rewards))
        reward, decides = rewards[name], name
    else:
        decides = "reward"
    above = right.above or 0.0
    return None if reward is None else reward > above, f"{decides} above {above:g}"


def value_changes(
    values: list[float | None], trained: list[bool], segments: list[dict], reward: float | None
) -> list[float | None]:
    """
    What the choice of each token did to the value: that after it less that before it. After the last one comes the
    reward. Tokens that the policy did not choose are passed over; next to a state whose value could not be read no
    change is known.
    """
    unread = {i for segment in segments if not segment["read"] for i in range(segment["start"], segment["end"])}
    changes: list[float | None] = [None] * len(values)
    after = reward
    for i in reversed(range(len(values))):
        value = values[i]
        if trained[i] and value is not None:
            changes[i] = None if after is None else after - value
            after = value
        elif trained[i] and i in unread:
            after = None
    return changes


def _on_tokens(name: str, numbers: list, length: int, has_tokens: bool, where: str) -> list[float | None]:
    if not has_tokens:
        raise BadTable(f"{where} has numbers per token ({name!r}), but no tokens (a column {_either(TOKENS)}).")
    if len(numbers) > length:
        raise BadTable(f"{where} has {len(numbers)} numbers in {name!r} for {length} tokens.")
    return [_finite(x) for x in numbers] + [None] * (length - len(numbers))  # padding has none


def _segments(segments: Any, length: int, where: str) -> list[dict]:
    if not segments or isinstance(segments, str):  # text in the completions table of a trainer
        return []
    kept = []
    for segment in segments if isinstance(segments, list) else [segments]:
        try:
            start, end = int(segment["start"]), int(segment["end"])
        except (TypeError, KeyError, ValueError) as error:
            raise BadTable(f"{where} has a segment without whole numbers `start` and `end`.") from error
        if not 0 <= start <= end <= length:
            raise BadTable(f"{where} has a segment from token {start} to {end}, of {length} tokens.")
        value = _finite(segment.get("value"))
        kept.append(
            {
                "start": start,
                "end": end,
                "read": segment.get("read") is not False and ("value" not in segment or value is not None),
                "value": None if segment.get("read") is False else value,
                "advantage": _finite(segment.get("advantage")),
                "reasoning": _plain(segment.get("reasoning") or ""),
            }
        )
    return kept


def _finite(x: Any) -> float | None:
    return float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None


def _plain(value: Any) -> str:
    """Text as it is, the messages of a conversation below each other, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n".join(f"{m.get('role', '')}: {_plain(m['content'])}" for m in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
