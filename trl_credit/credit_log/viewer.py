"""
Writes completions into one HTML file that needs nothing else, and can do nothing else.

Texts are JSON. Tokens are numbers of a table of texts; they and all numbers per token go in 16 bits each, compressed,
so that 64 completions of 4,000 tokens fit.
"""

import base64
import hashlib
import json
import math
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from .reader import Completion


# A page larger than this has the longest completions cut in the middle, and if need be prompts and reasoning at their
# ends, and says so.
MAX_BYTES = 5_000_000
_MAX_TEXT, _MAX_SHORT_TEXT = 20_000, 1_000  # characters of a prompt or a critic's reasoning; of a token or any other
# What a quantity is a distance from: near it small differences count.
_CENTERS = {"ratio": 1.0}
_ASSETS = ("viewer.html", "viewer.css", "numbers.js", "panel.js", "list.js")


def write_page(completions: list[Completion], path: str | Path, title: str) -> dict[str, int]:
    """
    Write a page that shows completions.

    Args:
        completions (`list[Completion]`):
            From [`read_completions`].
        path (`str` or `Path`):
            The file to write.
        title (`str`):
            The page's title.

    Returns:
        `dict[str, int]`: The `bytes` of the page, and how many `tokens_left_out` of it to keep it small.
    """
    shell = _shell().encode()
    room = MAX_BYTES - len(shell)
    tokens, characters = max(len(completion.tokens) for completion in completions), _MAX_TEXT
    while len(filled := _filled(shell, title, completions, tokens, characters)) > MAX_BYTES:
        if tokens > 512 or characters < 100:
            tokens = min(int(tokens * room / (len(filled) - len(shell)) * 0.98), tokens - 1)
        else:
            characters //= 2
        if tokens < 16:  # far too many completions
            break
    Path(path).write_bytes(filled)
    return {
        "bytes": len(filled),
        "tokens_left_out": sum(max(0, len(completion.tokens) - tokens) for completion in completions),
    }


def _filled(shell: bytes, title: str, completions: list[Completion], max_tokens: int, max_characters: int) -> bytes:
    packed = _Packed()
    data = _embedded({"title": title, **_data(completions, packed, max_tokens, max_characters)})
    before, after = shell.split(b"{{data}}")  # the data may hold any text, the name of a place to fill among them
    return before + data + after.replace(b"{{numbers}}", packed.base64())


class _Packed:
    """Arrays of 16-bit numbers behind each other."""

    def __init__(self):
        self._arrays: list[np.ndarray] = []
        self._length = 0

    def add(self, numbers: np.ndarray) -> int:
        """Add some; returns where they begin."""
        start = self._length
        self._arrays.append(numbers.astype("<u2"))
        self._length += len(numbers)
        return start

    def base64(self) -> bytes:
        """All of them, compressed; the upper bytes, which are much alike, first."""
        numbers = np.concatenate([np.zeros(0, "<u2"), *self._arrays])
        return base64.b64encode(zlib.compress(numbers.view(np.uint8).reshape(-1, 2).T[::-1].tobytes(), 9))


def _shell() -> str:
    """The page without its data. Its policy lets it run its own script and fetch nothing."""
    html, css, *scripts = (files(__package__).joinpath("assets", name).read_text("utf-8") for name in _ASSETS)
    js = "\n".join(scripts)
    policy = f"default-src 'none'; script-src {_hash(js)}; style-src {_hash(css)}; base-uri 'none'; form-action 'none'"
    return html.replace("{{policy}}", policy).replace("{{style}}", css).replace("{{script}}", js)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: Any) -> bytes:
    """JSON that no HTML parser sees the end of a script in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").encode("utf-8", "replace")  # a lone surrogate is no UTF-8


def _data(completions: list[Completion], packed: _Packed, max_tokens: int, max_characters: int) -> dict:
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(c.prompt for c in completions))}
    texts: dict = {}
    table: dict[tuple[str, int | None], int] = {}
    told = [
        {
            "source": c.source,
            "method": c.method,
            "step": c.step,
            "row": c.row,
            "index": c.index,
            "prompt": prompts[c.prompt],
            "text": texts.setdefault(c.text, len(texts)),
            "right": c.right,
            "rightBy": _cut(c.right_by, _MAX_SHORT_TEXT),
            "reward": _short(c.reward),
            "rewards": {name: _short(x) for name, x in c.rewards.items()},
            "facts": {name: _cut(text, min(_MAX_SHORT_TEXT, max_characters)) for name, text in c.facts.items()},
            "segments": [
                {
                    **segment,
                    "value": _short(segment["value"]),
                    "advantage": _short(segment["advantage"]),
                    "reasoning": _cut(segment["reasoning"], max_characters),
                }
                for segment in c.segments
            ],
            **_tokens(c, packed, table, max_tokens),
        }
        for c in completions
    ]
    return {
        "prompts": [_cut(prompt, max_characters) for prompt in prompts],
        "texts": [_cut(text, _MAX_SHORT_TEXT) for text, _ in table],
        "ids": [token for _, token in table],
        "completions": told,
    }


def _tokens(c: Completion, packed: _Packed, table: dict, max_tokens: int) -> dict:
    length = len(c.tokens)
    left_out = max(0, length - max_tokens)
    at = (max_tokens + 1) // 2 if left_out else length

    def kept(values: list) -> list:
        return values[:at] + values[at + left_out :]

    trained = kept(c.trained)
    ids = kept(c.token_ids) if c.token_ids else [None] * len(trained)
    rows = np.array([table.setdefault(token, len(table)) for token in zip(kept(c.tokens), ids, strict=True)], np.int64)
    return {
        "length": length,
        "cutAt": at,
        "leftOut": left_out,
        "count": len(rows),
        "tokens": [packed.add(rows & 0xFFFF), packed.add(rows >> 16) if len(table) > 1 << 16 else None],
        "trained": None if all(trained) else [int(x) for x in trained],
        "columns": {name: _column(name, kept(column), trained, packed) for name, column in c.columns.items()},
    }


def _column(name: str, numbers: list[float | None], trained: list[bool], packed: _Packed) -> float | int | dict | None:
    """
    One number, if it is that of all tokens that were trained on, or half floats of a unit, a power of two that makes
    the largest of them fit: their error is below 0.05 %, over eight powers of ten and more.
    """
    distinct = {x for x, is_trained in zip(numbers, trained, strict=True) if is_trained}
    if len(distinct) == 1 and all(x is None for x, is_trained in zip(numbers, trained, strict=True) if not is_trained):
        return _short(distinct.pop())
    center = _CENTERS.get(name, 0.0)
    distance = np.array([math.nan if x is None else x - center for x in numbers])
    reach = np.nanmax(np.abs(distance), initial=0.0)
    unit = 2.0 ** (math.frexp(reach)[1] - 15) if reach else 1.0
    return {"at": packed.add((distance / unit).astype("<f2").view("<u2")), "unit": unit, "center": center}


def _short(x: float | None) -> float | int | None:
    """Four digits, as short as JSON can have them."""
    if x is None:
        return None
    x = float(f"{x:.4g}")
    return int(x) if x == int(x) and abs(x) < 1e6 else x


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} … ({len(text) - length:,} more characters)"
