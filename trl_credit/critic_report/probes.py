"""
Monte-Carlo truth: rollouts of a policy, states cut out of them, and independent continuations of each state.

The value of a state is the mean reward of its continuations. They are drawn once and kept in a folder, line by line as
they come: `rollouts.jsonl` and `continuations.jsonl`, which `datasets.load_dataset("json", ...)` reads too, and
`probes.json`, which records their policy, prompts and settings.
"""

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .policies import Decoding, Policy
from .scoring import Scorer


FORMAT = 1
_MANIFEST, _ROLLOUTS, _CONTINUATIONS = "probes.json", "rollouts.jsonl", "continuations.jsonl"


@dataclass(frozen=True)
class ProbeSettings:
    """
    Which probes are drawn.

    Args:
        completions (`int`, *optional*, defaults to `4`):
            Completions of each prompt.
        continuations (`int`, *optional*, defaults to `16`):
            Continuations of each state, at least 2.
        cuts (`str`, *optional*, defaults to `"deciles"`):
            The states of a completion, always starting with the prompt alone: `"deciles"` of its length; `"N"`, every N
            tokens; `"lines"`; `"after:TEXT"`, after each occurrence of a text.
        candidates (`int`, *optional*, defaults to `4`):
            Number of next steps, from one state per completion, that the critic has to rank; 0 for none.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of a completion, including any part that is given.
        decoding ([`Decoding`], *optional*):
            How tokens are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Of the sampling.
    """

    completions: int = 4
    continuations: int = 16
    cuts: str = "deciles"
    candidates: int = 4
    max_completion_length: int = 256
    decoding: Decoding = field(default_factory=Decoding)
    seed: int = 0

    def __post_init__(self):
        for name, least in (("completions", 1), ("continuations", 2), ("candidates", 0), ("max_completion_length", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
        if self.candidates == 1 or self.candidates > self.continuations:
            raise ValueError(
                f"`candidates` must be 0, or 2 to `continuations` ({self.continuations}), from which they are taken; "
                f"got {self.candidates}."
            )
        is_number = str(self.cuts).isdecimal() and int(self.cuts) > 0
        if not (is_number or self.cuts in ("deciles", "lines") or self.cuts.startswith("after:") and self.cuts[6:]):
            raise ValueError(
                f"`cuts` must be 'deciles', 'lines', a number of tokens or 'after:TEXT', got {self.cuts!r}."
            )


@dataclass
class Rollout:
    """
    A prompt and its completion, or the beginning of one.

    Args:
        prompt (`str` or `list[dict]`):
            As in the data.
        prompt_ids, completion_ids (`list[int]`):
            Their tokens.
        cuts (`list[int]`):
            Numbers of completion tokens after which there is a state with continuations; 0 means the prompt alone.
        returns (`np.ndarray`):
            Rewards of the continuations of each of these states, shape `(len(cuts), n)`; NaN where none was given.
        group (`int`):
            Number of the prompt.
        reward (`float`):
            Reward of the completion; NaN for the beginning of one.
        other_rewards (`list[float]`):
            Rewards of the other completions of the prompt, as far as they were scored.
        row (`dict`):
            The row of the data, for critics that are told more than the prompt.
    """

    prompt: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    cuts: list[int]
    returns: np.ndarray
    group: int
    reward: float = math.nan
    other_rewards: list[float] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def true_values(self) -> np.ndarray:
        """Estimates of V* at the cuts."""
        return np.nanmean(self.returns, axis=1)


@dataclass
class Probes:
    """
    What was drawn.

    Args:
        rollouts (`list[Rollout]`):
            Whole completions, those of a prompt next to each other. Completions that were not scored are left out, as
            are states with fewer than two scored continuations.
        candidates (`list[list[Rollout]]`):
            Distinct next steps from the same state, with one cut, at their end.
        manifest (`dict`):
            Policy, prompts, rewards and settings.
        sampled_tokens (`int`):
            Tokens that were sampled, by this and earlier runs.
    """

    rollouts: list[Rollout]
    candidates: list[list[Rollout]]
    manifest: dict
    sampled_tokens: int


def draw_probes(
    folder: str | Path,
    policy: Policy,
    dataset: Iterable[dict],
    reward_funcs: Callable | Sequence[Callable],
    settings: ProbeSettings | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    reward_weights: Sequence[float] | None = None,
) -> Probes:
    """
    Probes of a policy: read from a folder as far as they exist, and drawn otherwise.

    Args:
        folder (`str` or `Path`):
            Where they are kept. An existing folder must belong to the same policy, prompts, rewards and settings.
        policy ([`Policy`]):
            What samples, see [`load_policy`].
        dataset (`Iterable[dict]`):
            Rows with a `prompt`, text or messages, and any columns that the reward functions read.
        reward_funcs (`Callable` or a list of them):
            Reward functions as in TRL; several are summed. A completion for which all return `None` is not scored, and
            left out.
        settings ([`ProbeSettings`], *optional*):
            What is drawn.
        on_progress (`Callable[[int, int], None]`, *optional*):
            Called with the number of sequences drawn so far and the total.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function, as TRL's `reward_weights`. Default: 1 for each.

    Returns:
        [`Probes`]: All of them.

    Raises:
        ValueError: If the folder holds probes of something else, a reward is infinite, or nothing was scored.
    """
    settings = settings or ProbeSettings()
    rows = [dict(row) for row in dataset]
    if not rows:
        raise ValueError("There are no prompts to draw probes from.")
    drawer = _Drawer(Path(folder), policy, rows, Scorer(reward_funcs, reward_weights), settings, on_progress)
    drawer.draw()
    return _assemble(drawer)


class _Drawer:
    """Plans what is missing, samples it, and writes it down."""

    def __init__(self, folder, policy, rows, scorer: Scorer, settings: ProbeSettings, on_progress):
        self.folder, self.policy, self.rows, self.scorer = folder, policy, rows, scorer
        self.settings, self.on_progress = settings, on_progress
        self.prompt_ids = [prompt_ids(policy.tokenizer, row.get("prompt")) for row in rows]
        self.manifest = {
            "format": FORMAT,
            "policy": policy.identity,
            "prompts": _fingerprint(rows),
            "rewards": scorer.names,
            "reward_weights": scorer.weights.tolist() if (scorer.weights != 1).any() else None,
            "settings": asdict(settings),
        }
        _agree(folder, self.manifest)
        self.rollouts = {(line["prompt"], line["sample"]): line for line in _read(folder / _ROLLOUTS)}
        self.continuations = {_key(line): line for line in _read(folder / _CONTINUATIONS)}

    def draw(self) -> None:
        settings = self.settings
        wanted = [(prompt, sample) for prompt in range(len(self.rows)) for sample in range(settings.completions)]
        missing = [key for key in wanted if key not in self.rollouts]
        for number, chunk in self._chunks(wanted, missing, per_item=1):
            starts = [self.prompt_ids[prompt] for prompt, _ in chunk]
            samples = self._sample(starts, [settings.max_completion_length] * len(chunk), "rollouts", number)
            rewards = self._score([prompt for prompt, _ in chunk], samples)
            lines = [
                {"prompt": prompt, "sample": sample, "completion_ids": ids, "reward": reward}
                for (prompt, sample), ids, reward in zip(chunk, samples, rewards, strict=True)
                if (prompt, sample) not in self.rollouts
            ]
            _append(self.folder / _ROLLOUTS, lines)
            self.rollouts.update(((line["prompt"], line["sample"]), line) for line in lines)
        self.cuts = {
            key: find_cuts(self.rollouts[key]["completion_ids"], settings.cuts, self.policy.tokenizer) for key in wanted
        }
        self._continue([(*key, position, -1) for key in wanted for position in self.cuts[key]], {})
        steps = {(*key, at, number): step for key in wanted for at, number, step in self._candidates(key)}
        self._continue(list(steps), steps)
        self.steps = steps

    def _continue(self, states: list[tuple], steps: dict[tuple, list[int]]) -> None:
        """Continuations of states (prompt, sample, position, candidate), `steps` after them."""
        n = self.settings.continuations

        def prefix(state):
            prompt, sample, position, _ = state
            return self.rollouts[prompt, sample]["completion_ids"][:position] + steps.get(state, [])

        # By length, for the sequences of a batch wait for the longest.
        states = sorted(states, key=lambda state: (-len(prefix(state)), state))
        missing = [state for state in states if state not in self.continuations]
        stage = "candidates" if steps else "states"
        for number, chunk in self._chunks(states, missing, per_item=n):
            repeated = [state for state in chunk for _ in range(n)]
            prefixes = [prefix(state) for state in repeated]
            starts = [self.prompt_ids[state[0]] + ids for state, ids in zip(repeated, prefixes, strict=True)]
            room = [self.settings.max_completion_length - len(ids) for ids in prefixes]
            samples = self._sample(starts, room, stage, number)
            whole = [ids + more for ids, more in zip(prefixes, samples, strict=True)]
            rewards = self._score([state[0] for state in repeated], whole)
            lines = [
                {
                    **dict(zip(("prompt", "sample", "position", "candidate"), state, strict=True)),
                    "step_ids": steps.get(state, []),
                    "continuation_ids": samples[n * i : n * (i + 1)],
                    "returns": rewards[n * i : n * (i + 1)],
                }
                for i, state in enumerate(chunk)
                if state not in self.continuations
            ]
            _append(self.folder / _CONTINUATIONS, lines)
            self.continuations.update((_key(line), line) for line in lines)

    def returns(self, state: tuple) -> np.ndarray | None:
        """Rewards of a state's continuations, NaN where there is none; `None` for fewer than two."""
        returns = np.array(self.continuations[state]["returns"], dtype=float)
        return returns if np.isfinite(returns).sum() > 1 else None

    def _candidates(self, key: tuple[int, int]) -> Iterator[tuple[int, int, list[int]]]:
        """Different next steps out of one state of a rollout: the beginnings of its first continuations."""
        cuts, length = self.cuts[key], len(self.rollouts[key]["completion_ids"])
        if not self.settings.candidates:
            return
        at = random.Random(f"{self.settings.seed} {key}").randrange(len(cuts))
        position, following = cuts[at], [*cuts, length][at + 1]
        prefix = self.rollouts[key]["completion_ids"][:position]
        seen = []
        for ids in self.continuations[*key, position, -1]["continuation_ids"]:
            if self.settings.cuts == "deciles":
                end = position + max(following - position, 1)
            else:
                later = find_cuts(prefix + ids, self.settings.cuts, self.policy.tokenizer)
                end = next((cut for cut in later if cut > position), len(prefix) + len(ids))
            # What ends within the step has no state after it.
            if end < len(prefix) + len(ids) and (step := ids[: end - position]) not in seen:
                seen.append(step)
        if len(seen) > 1:
            for number, step in enumerate(seen[: self.settings.candidates]):
                yield position, number, step

    def _chunks(self, planned: list, missing: list, per_item: int) -> Iterator[tuple[int, list]]:
        """
        What is missing, a call of the policy at a time. Chunks are those of the whole plan, numbered, so that an
        interrupted run draws with the seeds that it would have had.
        """
        size = max(self.policy.sequences_per_call // per_item, 1)
        left = set(missing)
        done = (len(planned) - len(left)) * per_item
        for number, at in enumerate(range(0, len(planned), size)):
            chunk = planned[at : at + size]
            if left.isdisjoint(chunk):
                continue
            self.on_progress(done, len(planned) * per_item)
            yield number, chunk
            done += len(left.intersection(chunk)) * per_item
        self.on_progress(done, len(planned) * per_item)

    def _sample(self, starts, room, stage: str, number: int) -> list[list[int]]:
        seed = int.from_bytes(hashlib.sha256(f"{self.settings.seed} {stage} {number}".encode()).digest()[:4])
        return self.policy.sample(starts, room, self.settings.decoding, seed)

    def _score(self, prompts: list[int], completions: list[list[int]]) -> list[float | None]:
        """Rewards of completions, each of one of the prompts; `None` for one that was not scored."""
        rewards = self.scorer([self.rows[prompt] for prompt in prompts], completions, self.policy.tokenizer)
        return [None if math.isnan(reward) else reward for reward in rewards]


def _assemble(drawer: _Drawer) -> Probes:
    rollouts: list[Rollout] = []
    candidates: list[list[Rollout]] = []
    steps: dict[tuple[int, int], list[tuple]] = {}
    for state in drawer.steps:
        steps.setdefault(state[:2], []).append(state)
    for (prompt, sample), cuts in drawer.cuts.items():
        line = drawer.rollouts[prompt, sample]
        others = [drawer.rollouts[prompt, s]["reward"] for s in range(drawer.settings.completions) if s != sample]
        common = {
            "prompt": drawer.rows[prompt]["prompt"],
            "row": drawer.rows[prompt],
            "prompt_ids": drawer.prompt_ids[prompt],
            "group": prompt,
            "other_rewards": [reward for reward in others if reward is not None],
        }
        scored = {cut: returns for cut in cuts if (returns := drawer.returns((prompt, sample, cut, -1))) is not None}
        if line["reward"] is not None and scored:
            rollouts.append(
                Rollout(
                    **common,
                    completion_ids=line["completion_ids"],
                    cuts=list(scored),
                    returns=np.array([*scored.values()]),
                    reward=line["reward"],
                )
            )
        following = []
        for state in steps.get((prompt, sample), []):
            if (returns := drawer.returns(state)) is not None:
                ids = line["completion_ids"][: state[2]] + drawer.steps[state]
                following.append(Rollout(**common, completion_ids=ids, cuts=[len(ids)], returns=returns[None]))
        if len(following) > 1:
            candidates.append(following)
    if not rollouts:
        raise ValueError(
            f"{', '.join(drawer.scorer.names)} scored no completion with two continuations of a state: every reward is "
            "None or NaN. There is nothing to hold a critic against."
        )
    tokens = sum(len(line["completion_ids"]) for line in drawer.rollouts.values())
    tokens += sum(len(ids) for line in drawer.continuations.values() for ids in line["continuation_ids"])
    return Probes(rollouts, candidates, drawer.manifest, tokens)


def find_cuts(completion_ids: list[int], cuts: str, tokenizer) -> list[int]:
    """
    Where the states of a completion are, see [`ProbeSettings`].

    Returns:
        `list[int]`: Numbers of tokens before them, rising, 0 first, all less than the length.
    """
    length = len(completion_ids)
    if cuts == "deciles":
        return sorted({length * tenth // 10 for tenth in range(10)})
    if cuts.isdecimal():
        return list(range(0, length, int(cuts)))
    text = "\n" if cuts == "lines" else cuts.removeprefix("after:")
    found, tail = [0], ""
    for position, piece in enumerate(tokenizer.batch_decode([[token] for token in completion_ids]), start=1):
        tail += piece
        if text in tail:
            found.append(position)
            tail = tail[tail.rindex(text) + len(text) :]
        tail = tail[-len(text) :]
    return [position for position in found if position < length]


def prompt_ids(tokenizer, prompt) -> list[int]:
    """The tokens of a prompt, of text or of messages, as TRL makes them."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if not (isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)):
        raise ValueError(f"Each row needs a `prompt`, a text or a list of messages; got {prompt!r}.")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def _key(line: dict) -> tuple:
    return line["prompt"], line["sample"], line["position"], line["candidate"]


def _fingerprint(rows: list[dict]) -> str:
    text = json.dumps(rows, sort_keys=True, default=str)
    return f"{len(rows)} rows, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _agree(folder: Path, manifest: dict) -> None:
    """Begin a folder, or check that it is of the same."""
    path = folder / _MANIFEST
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        partial.rename(path)
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    for name, wanted in _flat(manifest).items():
        found = _flat(kept).get(name)
        if found != wanted:
            raise ValueError(
                f"{folder} holds probes with {name}={found!r}, and {name}={wanted!r} is asked for. Choose another "
                "folder for these, or the settings of those."
            )


def _flat(tree: dict) -> dict:
    flat: dict = {}
    for name, value in tree.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _read(path: Path) -> Iterator[dict]:
    """Lines of a file; a last one that an interrupted run left unfinished is cut off."""
    if not path.exists():
        return
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    for line in whole.splitlines():
        yield json.loads(line)


def _append(path: Path, lines: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
