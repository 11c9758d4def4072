"""Rollouts of a policy that does not move, on the disk: written once, read as often as a critic learns from them."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets

from ...critics.facts import fingerprint
from ...saved import MANIFEST, read_json, reading, write_whole


_SCHEMA = pa.schema(
    [
        ("row", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("chosen", pa.list_(pa.bool_())),
        ("scores", pa.list_(pa.float64())),
        ("token_scores", pa.list_(pa.list_(pa.float64()))),
    ]
)
# What decides what a policy writes.
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_completion_length",
    "mask_truncated_completions",
    "num_generations",
    "generation_kwargs",
    "chat_template_kwargs",
)
# Of the data, the prompts that tell them from others.
_FIRST_PROMPTS = 1000
_NUMBERS_OF_A_WEIGHT = 64


class StoredRollouts:
    """
    A folder with rollouts of one policy, each in a file that is whole or absent, and a manifest that says whose they
    are. It grows when more are asked for.

    Args:
        folder (`Path`):
            The folder; every process must see it.
        facts (`dict[str, Any]`):
            What the rollouts depend on, see [`facts_of`].
        order (`dict[str, Any]`):
            What else decides which rollout is which: to write more, it must be the same.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], order: dict[str, Any]):
        self.folder, self.order = folder, order
        self.manifest = {"facts": facts, "order": order}
        if (folder / MANIFEST).is_file():
            self.manifest = read_json(folder / MANIFEST)
            self._refuse_others(facts)
        elif folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"`critic_pretraining_rollouts={str(folder)!r}` holds no {MANIFEST}, but other files: it is no folder "
                "of rollouts. Choose one that does not exist, or is empty."
            )

    def __len__(self) -> int:
        """How many are there."""
        number = 0
        while self._file(number).is_file():
            number += 1
        return number

    @property
    def completions(self) -> int:
        """How many completions they have."""
        return len(self) * self.manifest["order"]["generation_batch_size"]

    def append(self, samples: list[dict]) -> None:
        """Add a rollout, all of it or nothing. Only one process may call this."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).is_file():
            write_whole(self.folder / MANIFEST, f"{json.dumps(self.manifest, indent=2)}\n".encode())
        stream = pa.BufferOutputStream()
        table = pa.Table.from_pylist(samples, schema=_SCHEMA)
        with pa.ipc.new_stream(stream, _SCHEMA) as writer:
            writer.write_table(table)
        write_whole(self._file(len(self)), stream.getvalue())

    def read(self, completions: int) -> Dataset:
        """The first completions, in memory only when they are asked for."""
        parts = []
        for number in range(len(self)):
            with reading(self._file(number)):
                parts.append(Dataset.from_file(str(self._file(number))))
        return concatenate_datasets(parts).select(range(completions))

    def refuse_more(self, completions: int) -> None:
        """Raise if rollouts that are to be written now would not go on where those that are there end."""
        differ = _differences(self.manifest["order"], self.order)
        if differ:
            raise ValueError(
                f"`critic_pretraining_rollouts={str(self.folder)!r}` holds {self.completions} completions, and "
                f"{completions} are asked for (`critic_pretraining_steps`, over as many processes). To write more, "
                f"these must be as they were: {differ}. Ask for fewer steps, or choose another folder."
            )

    def _refuse_others(self, facts: dict[str, Any]) -> None:
        stored, facts = dict(self.manifest["facts"]), dict(facts)
        if None in (stored["weights"], facts["weights"]):  # then the policy goes by its name
            stored["weights"] = facts["weights"] = None
        else:
            stored["policy"] = facts["policy"]
        differ = _differences(stored, facts)
        if differ:
            raise ValueError(
                f"The rollouts in `critic_pretraining_rollouts={str(self.folder)!r}` are not those of this run: "
                f"{differ}. Choose another folder, to have them written anew, or the same settings."
            )

    def _file(self, number: int) -> Path:
        return self.folder / f"rollout_{number:05d}.arrow"


class Passes:
    """
    The order in which stored completions are read: again and again all of one part, and the other part to see how well
    they are known. Completions of a prompt stay together.

    Args:
        data (`Dataset`):
            The completions, those of a prompt next to each other.
        num_generations (`int`):
            Completions per prompt.
        batch_size (`int`):
            Completions of a rollout, of all processes.
        held_out (`float`):
            Share of the prompts in the other part.
        seed (`int`):
            Of the order of each pass.
    """

    def __init__(self, data: Dataset, num_generations: int, batch_size: int, held_out: float, seed: int):
        self.data, self.num_generations, self.batch_size, self.seed = data, num_generations, batch_size, seed
        self.scores = torch.tensor(data["scores"][:])  # (N, F)
        rows = data.select(range(0, len(data), num_generations))["row"][:]
        prompts = [json.dumps(json.loads(row)["prompt"]) for row in rows]
        kept_apart = _held_out_prompts(prompts, held_out)
        groups = range(len(prompts))
        self.training = [group for group in groups if prompts[group] not in kept_apart]
        self.held_out = [group for group in groups if prompts[group] in kept_apart]
        if not self.training:
            raise ValueError(
                f"`critic_pretraining_held_out={held_out}` of {len(set(prompts))} prompts leaves none to learn from: "
                "raise `critic_pretraining_steps`, for more rollouts, or set it to 0."
            )

    def __len__(self) -> int:
        """Rollouts of a pass."""
        return -(-len(self.training) * self.num_generations // self.batch_size)

    def numbered(self, number: int) -> list[list[int]]:
        """The rollouts of a pass as rows of the data, in an order of its own; -1 fills up the last one."""
        groups = list(self.training)
        random.Random(f"{self.seed} {number}").shuffle(groups)
        return self._rollouts(groups)

    def of_held_out(self) -> list[list[int]]:
        """The same of the other part."""
        return self._rollouts(self.held_out)

    def share(self, rows: Sequence[int], start: int, stop: int) -> tuple[dict[str, list], torch.Tensor]:
        """Some completions of a rollout, and the scores of all of them: none for what fills it up."""
        index = torch.tensor(rows)
        scores = torch.where((index >= 0).unsqueeze(1), self.scores[index.clamp(min=0)], torch.nan)
        return self.data[[max(row, 0) for row in rows[start:stop]]], scores

    def _rollouts(self, groups: Sequence[int]) -> list[list[int]]:
        size = self.num_generations
        rows = [row for group in groups for row in range(group * size, (group + 1) * size)]
        rows += [-1] * (-len(rows) % self.batch_size)
        return [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]


def facts_of(trainer: Any) -> dict[str, Any]:
    """What the rollouts of a trainer depend on. Call it before the policy moves, and before it is split up."""
    args, rollout_func = trainer.args, trainer.rollout_func
    return {
        "policy": trainer.model.config.name_or_path,
        "weights": _hash_of_weights(trainer.model),
        "tokenizer": fingerprint(trainer.processing_class),
        **{name: getattr(args, name) for name in _SAMPLING},
        "rollout_func": getattr(rollout_func, "__name__", rollout_func and type(rollout_func).__name__),
        "reward_funcs": list(trainer.reward_func_names),
        "prompts": _hash_of_prompts(trainer.train_dataset),
    }


def _hash_of_weights(model: Any) -> str | None:
    """Of some numbers of each weight; `None` if this process does not have them all."""
    found = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if hasattr(p, "ds_id"):
            return None
        if ".lora_A." in name:  # random in every run, and without effect until lora_B has learned
            continue
        stride = max(p.numel() // _NUMBERS_OF_A_WEIGHT, 1)
        numbers = p.detach().flatten()[::stride].float().cpu().numpy()
        found.update(f"{name} {tuple(p.shape)}".encode() + numbers.tobytes())
    return found.hexdigest()[:16]


def _hash_of_prompts(data: Iterable[dict]) -> str:
    prompts = [row["prompt"] for row in islice(iter(data), _FIRST_PROMPTS)]
    return hashlib.sha256(json.dumps(prompts, default=str).encode()).hexdigest()[:16]


def _held_out_prompts(prompts: Sequence[str], share: float) -> set[str]:
    """Always the same ones: those with the smallest hashes."""
    distinct = sorted(set(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    return set(distinct[: max(round(share * len(distinct)), 1)]) if share else set()


def _differences(stored: dict[str, Any], now: dict[str, Any]) -> str:
    now = json.loads(json.dumps(now))  # lists for tuples
    return ", ".join(
        f"`{name}` was {stored.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys([*stored, *now])
        if stored.get(name) != now.get(name)
    )
