"""Writes completions into one HTML file that needs nothing else, and can do nothing else."""

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from .reader import Completion


# A page larger than this has the longest completions cut in the middle, and if need be prompts and reasoning at their
# ends, and says so.
MAX_BYTES = 5_000_000
_MAX_TEXT, _MAX_SHORT_TEXT = 20_000, 1_000  # characters of a prompt or a critic's reasoning; of a token or any other
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
    shell = _shell()
    room = MAX_BYTES - len(shell.encode())
    tokens, characters = max(len(completion.tokens) for completion in completions), _MAX_TEXT
    while len(data := _embedded({"title": title, **_data(completions, tokens, characters)})) > room:
        if tokens > 512 or characters < 100:
            tokens = min(int(tokens * room / len(data) * 0.98), tokens - 1)
        else:
            characters //= 2
        if tokens < 16:  # far too many completions
            break
    page = shell.encode().replace(b"{{data}}", data)
    Path(path).write_bytes(page)
    return {
        "bytes": len(page),
        "tokens_left_out": sum(max(0, len(completion.tokens) - tokens) for completion in completions),
    }


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


def _data(completions: list[Completion], max_tokens: int, max_characters: int) -> dict:
    prompts = list(dict.fromkeys(completion.prompt for completion in completions))
    texts: dict = {}
    return {
        "prompts": [_cut(prompt, max_characters) for prompt in prompts],
        "completions": [
            {
                "source": c.source,
                "method": c.method,
                "step": c.step,
                "row": c.row,
                "prompt": prompts.index(c.prompt),
                "text": texts.setdefault(c.text, len(texts)),
                "right": c.right,
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
                **_tokens(c, max_tokens),
            }
            for c in completions
        ],
    }


def _tokens(c: Completion, max_tokens: int) -> dict:
    length = len(c.tokens)
    left_out = max(0, length - max_tokens)
    at = (max_tokens + 1) // 2 if left_out else length

    def kept(values: list) -> list:
        return values[:at] + values[at + left_out :]

    trained = kept(c.trained)
    columns = {}
    for name, column in c.columns.items():
        numbers = [_short(x) for x in kept(column)]
        distinct = {x for x, is_trained in zip(numbers, trained, strict=True) if is_trained}
        same = len(distinct) == 1 and all(x is None for x, t in zip(numbers, trained, strict=True) if not t)
        columns[name] = distinct.pop() if same else numbers
    return {
        "length": length,
        "cutAt": at,
        "leftOut": left_out,
        "tokens": [_cut(token, _MAX_SHORT_TEXT) for token in kept(c.tokens)],
        "ids": kept(c.token_ids) if c.token_ids else None,
        "trained": None if all(trained) else [int(x) for x in trained],
        "columns": columns,
    }


def _short(x: float | None) -> float | int | None:
    """Four digits, as short as JSON can have them."""
    if x is None:
        return None
    x = float(f"{x:.4g}")
    return int(x) if x == int(x) and abs(x) < 1e6 else x


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} … ({len(text) - length:,} more characters)"
