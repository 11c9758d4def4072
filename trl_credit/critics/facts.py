"""What a saved critic is, for whatever loads it: the file `critic.json` beside its weights."""

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file

from ..saved import read_json


FACTS_FILE = "critic.json"
# A kind of critic, and what a trainer is given for one that begins with the run.
PROBE = "probe"
# The `reward_range` of a run that learns it.
RUNNING = "running"
KINDS = {
    "token": "a critic of tokens (VAPO, PPO)",
    "prompt": "a critic of prompts (SPPO)",
    "generative": "a generative critic (GenAC)",
    PROBE: "a probe critic",
}
logger = get_logger(__name__)


@dataclass
class CriticFacts:
    """
    What a critic is asked, and how its answers are read.

    Args:
        kind (`str`):
            `"token"`, `"prompt"`, `"generative"` or `"probe"`.
        settings (`dict`, *optional*):
            Options of its trainer's config, by name, that determine what it is asked and how its answers are read.
        hint (`dict`, *optional*):
            Running means for a generative critic: `success_rate`, which it is told, and `mean_value`, which stands in
            for missing values, each as total and weight, see [`~trl_credit.credit.running_mean.RunningMean`].
        context (`int`, *optional*):
            Maximum number of tokens that it reads. Default: unknown, since its network does not say.
        tokenizer (`dict`, *optional*):
            Class, size and hash of the tokenizer that it reads with.
        own_tokenizer (`bool`, *optional*, defaults to `False`):
            Whether that tokenizer differs from the policy's. If not, a critic of prompts reads what the policy read.
        template_kwargs (`dict`, *optional*):
            Arguments of its tokenizer's chat template, for a critic of prompts.
        vocabulary_size (`int`, *optional*):
            Tokens that its network knows.
        reads (`dict`, *optional*):
            For a probe critic the `model` whose states it reads, a path or Hub id, and the `temperature` at which.
        updates (`int`, *optional*, defaults to `0`):
            Number of updates so far, including those of earlier stages.
        trl_credit (`str`, *optional*):
            The version that saved it.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    hint: dict[str, list[float]] | None = None
    context: int | None = None
    tokenizer: dict[str, Any] | None = None
    own_tokenizer: bool = False
    template_kwargs: dict[str, Any] | None = None
    vocabulary_size: int | None = None
    reads: dict[str, Any] | None = None
    updates: int = 0
    trl_credit: str = field(default_factory=lambda: version("trl-credit"))

    def save(self, folder: str | Path) -> None:
        """Write `critic.json` in a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (Path(folder) / FACTS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, source: Any, init_kwargs: dict | None = None) -> "CriticFacts | None":
        """
        The facts beside a checkpoint; `None` if there are none, as with 0.2.0's critics and anything that is not a
        critic, or for a model in memory.

        Args:
            source (`str`, `Path` or `PreTrainedModel`):
                Its folder or Hub id.
            init_kwargs (`dict`, *optional*):
                Those of `from_pretrained`: its revision and the like count for this file too.
        """
        if not isinstance(source, (str, Path)):
            return None
        if not Path(source).is_dir():
            _refuse_what_is_no_hub_id(str(source))
        shared = {name: x for name, x in (init_kwargs or {}).items() if name in ("revision", "token", "cache_dir")}
        path = cached_file(
            str(source),
            FACTS_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
            **shared,
        )
        if path is None:
            return None
        known = cls.__dataclass_fields__
        facts = read_json(Path(path))
        return cls(**{name: value for name, value in facts.items() if name in known})

    def refuse_other_kind(self, kind: str, source: Any) -> None:
        """Raise if the critic is not of the requested kind."""
        if self.kind != kind:
            raise ValueError(
                f"{source} is {KINDS.get(self.kind, repr(self.kind))}, as its {FACTS_FILE} says, and {KINDS[kind]} is "
                f"needed. Give one of kind {kind!r}."
            )

    def refuse_other_run(self, kind: str, settings: dict[str, Any], checkpoint: str) -> None:
        """Raise if the critic of a checkpoint is of another kind than the run's, or has other settings."""
        self.refuse_other_kind(kind, checkpoint)
        for name, own in self.settings.items():
            if name in settings and not _same(name, settings[name], own):
                raise ValueError(
                    f"{checkpoint} was saved by a run with `{name}={own!r}`, and this one has {settings[name]!r}: its "
                    f"critic's answers would be read otherwise than it gives them. Resume with `{name}={own!r}`, or "
                    "begin a new run."
                )

    def agreed(self, given: dict[str, Any], defaults: dict[str, Any], source: Any) -> dict[str, Any]:
        """
        The settings to use a critic with: its own, unless the caller asks for others.

        Args:
            given (`dict`):
                Settings that the caller asks for, by name. The critic's other settings do not matter.
            defaults (`dict`):
                Their values if nothing is asked for. A setting without a default always counts as asked for.
            source (`str` or `Path`):
                The critic, for the error.

        Returns:
            `dict`: `given`, with the critic's own settings for the defaults.

        Raises:
            ValueError: If a setting is asked for that differs from the critic's.
        """
        agreed = dict(given)
        for name, own in self.settings.items():
            if name not in given or _same(name, given[name], own):
                continue
            if name not in defaults or not _same(name, given[name], defaults[name]):
                raise ValueError(
                    f"`{name}={given[name]!r}` is asked for, but the critic {source} was trained with {own!r}. Leave "
                    f"`{name}` out, or set it to that; or, if the critic is to learn another question, delete its "
                    f"{FACTS_FILE}."
                )
            agreed[name] = own
        taken = {name: value for name, value in agreed.items() if not _same(name, value, given[name])}
        if taken:
            logger.warning("As the critic %s was trained, by its %s: %s", source, FACTS_FILE, taken)
        return agreed

    def applied_to(self, config: Any, kind: str, source: Any) -> Any:
        """
        The config, with the settings of the critic that its trainer starts from.

        Args:
            config ([`~trl_credit.trainers.critic.CriticConfig`]):
                The config. It is not changed.
            kind (`str`):
                The trainer's kind of critic.
            source (`str` or `Path`):
                The critic, for the error.

        Raises:
            ValueError: If the critic is of another kind, or an option of the config is set to something else.
        """
        self.refuse_other_kind(kind, source)
        fields = {name: x for name, x in config.__dataclass_fields__.items() if name in self.settings}
        given = {name: getattr(config, name) for name in fields}
        config = copy.copy(config)
        for name, value in self.agreed(given, {name: default_of(x) for name, x in fields.items()}, source).items():
            setattr(config, name, value)
        return config


def _refuse_what_is_no_hub_id(source: str) -> None:
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise FileNotFoundError(f"There is no critic in {source}: it is no folder, and no id of the Hub.") from None


def default_of(x: Any) -> Any:
    """The default of a dataclass's field."""
    return x.default_factory() if callable(x.default_factory) else x.default


def fingerprint(tokenizer: Any) -> dict[str, Any]:
    """What tells a tokenizer from others: its class, its number of tokens, and a hash of them."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "vocabulary": hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()[:16],
    }


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "hint_momentum":  # what matters is whether the critic is told a rate
        return (one is None) == (other is None)
    if name == "reward_range" and RUNNING in (one, other):  # a running range goes on from any other
        return None not in (one, other)
    both_are_lists = isinstance(one, (list, tuple)) and isinstance(other, (list, tuple))
    return one == other or both_are_lists and list(one) == list(other)
