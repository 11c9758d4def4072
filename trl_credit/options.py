"""
What a configuration says of an option beside its name and default: its text, which is the docstring's and the command
line's help; what it may be; and which settings leave it without effect.
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, get_args, get_origin


# --- For `field(metadata=...)`; several are joined by `|`


def one_of(*choices: str) -> dict:
    """The option is one of these, on the command line too."""
    return {"choices": list(choices)}


def at_least(low: float) -> dict:
    """A number not below `low`."""
    return {"range": (lambda x: x >= low, f"of at least {low}")}


def at_most(high: float) -> dict:
    """A number not above `high`."""
    return {"range": (lambda x: x <= high, f"of at most {high}")}


def above(low: float) -> dict:
    """A number greater than `low`."""
    return {"range": (lambda x: x > low, f"above {low}")}


def between(low: float, high: float, open_end: bool = False) -> dict:
    """A number from `low` to `high`, both of them included, or the latter left out."""
    if open_end:
        return {"range": (lambda x: low <= x < high, f"in [{low}, {high})")}
    return {"range": (lambda x: low <= x <= high, f"in [{low}, {high}]")}


def such_that(allows: Callable[[Any], bool], words: str) -> dict:
    """Anything that `allows` holds for, which are `words`."""
    return {"rule": (allows, words)}


def unless(**settings) -> dict:
    """The option has no effect with any of these settings of others: it must then be left at its default."""
    return {"unless": settings}


def only_with(**settings) -> dict:
    """The option has an effect with these settings of others alone: with others it must be left at its default."""
    return {"only_with": settings}


# --- The configuration


class Documented(NamedTuple):
    """An option in a docstring."""

    kind: str  # its type and default, as written
    text: str


class Options:
    """
    A dataclass's base, which reads the text of an option in the class's docstring, so that parsers find it as
    `metadata["help"]`, and holds options to what their annotation and metadata allow.

    An option that is declared again keeps what is not said anew: text, range and settings that leave it without effect.
    """

    # Options of other classes that may be less here: the values that are left, and what is wrong with others.
    restricted: ClassVar[dict[str, tuple[tuple, str]]] = {}

    _declared: ClassVar[dict[str, dict]] = {}  # metadata, by option

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        texts = documented_options(cls.__doc__ or "")
        cls._declared = dict(cls._declared)
        for name, annotation in inspect.get_annotations(cls).items():
            if get_origin(annotation) is ClassVar:
                continue
            option = cls.__dict__.get(name, MISSING)
            if not isinstance(option, Field):
                option = field(default=option)
                setattr(cls, name, option)
            inherited = getattr(cls, "__dataclass_fields__", {}).get(name)
            said = dict(inherited.metadata if inherited else {}) | cls._declared.get(name, {}) | option.metadata
            if name in texts:
                said["help"] = plain(texts[name].text)
            cls._declared[name] = said | {"rule": option.metadata.get("rule") or _rule(annotation, said)}
            # Parsers take what else is in the metadata for arguments of `add_argument`.
            shown = {key: value for key, value in said.items() if key not in ("range", "rule", "unless", "only_with")}
            option.metadata = MappingProxyType(shown)

    def check_options(self) -> None:
        """Raise `ValueError` for an option of this package that is not what it may be, or that has no effect."""
        for name, said in self._declared.items():
            value = getattr(self, name)
            allows, words = said["rule"]
            if not allows(value):
                raise ValueError(f"{type(self).__name__}: `{name}` must be {words}, got {value!r}.")
        for name, said in self._declared.items():
            if getattr(self, name) == self._default(name):
                continue
            needed = {other: (setting, False) for other, setting in said.get("unless", {}).items()}
            needed |= {other: (setting, True) for other, setting in said.get("only_with", {}).items()}
            for other, (setting, has_effect) in needed.items():
                if (getattr(self, other) == setting) != has_effect:
                    raise ValueError(
                        f"{type(self).__name__}: `{name}={getattr(self, name)!r}` has no effect with "
                        f"`{other}={getattr(self, other)!r}`. Leave it at {self._default(name)!r}."
                    )

    def check_restricted(self) -> None:
        """Raise `ValueError` for an option of another class that may be less here."""
        for name, (allowed, why) in self.restricted.items():
            value = getattr(self, name)
            if value not in allowed:
                advice = f"Leave it at {allowed[0]!r}" if len(allowed) == 1 else f"Choose one of {allowed}"
                raise ValueError(f"{type(self).__name__}: `{name}={value!r}` {why}. {advice}.")

    @classmethod
    def _default(cls, name: str) -> Any:
        option = getattr(cls, "__dataclass_fields__")[name]  # noqa: B009
        return option.default if option.default_factory is MISSING else option.default_factory()


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, which a truth value is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, which a truth value is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _rule(annotation: Any, said: dict) -> tuple[Callable[[Any], bool], str]:
    """What an option may be, as a test and in words. Texts, lists and dicts may be anything."""
    kinds = get_args(annotation) or (annotation,)
    in_range, where = said.get("range", (lambda x: True, ""))
    if "choices" in said:
        is_kind, words = said["choices"].__contains__, f"one of {tuple(said['choices'])}"
    elif bool in kinds:
        is_kind, words = (lambda x: isinstance(x, bool)), "True or False"
    elif int in kinds:
        is_kind, words = is_whole, f"a whole number {where}"
    elif float in kinds:
        is_kind, words = is_number, f"a number {where}" if where.startswith("in ") else f"a finite number {where}"
    else:
        return lambda value: True, ""
    if type(None) in kinds:
        return lambda value: value is None or (is_kind(value) and in_range(value)), f"{words.strip()}, or None"
    return lambda value: is_kind(value) and in_range(value), words.strip()


# --- Their texts


def documented_options(docstring: str) -> dict[str, Documented]:
    """
    The options that a docstring in TRL's style describes.

    Args:
        docstring (`str`):
            With a section `Args:` of entries ``name (`type`, *optional*, defaults to `value`):``, each with its text,
            indented further.

    Returns:
        `dict[str, Documented]`: Type and default as they are written, and the text in one line, by option.
    """
    arguments = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{inspect.cleandoc(docstring)}\n", re.M)
    entries = re.findall(r"^    (\w+) \((.*)\):\n((?: {8}.*\n|\n)*)", arguments[1] if arguments else "", re.M)
    return {name: Documented(kind, " ".join(text.split())) for name, kind, text in entries}


def plain(text: str) -> str:
    """A text for the command line: links are names, and `argparse` puts nothing in for a percent sign."""
    return re.sub(r"\[(`)~(?:\w+\.)*(\w+`)\]", r"\1\2", text).replace("%", "%%")
