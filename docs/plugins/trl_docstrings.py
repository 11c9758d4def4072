"""
Griffe extension: reads docstrings in TRL's style with griffe's Google parser.

TRL writes types in backticks, followed by "*optional*, defaults to ...", links as in [`Name`], notes as in
`> [!NOTE]` and equations between doubled backslashes.
"""

import re

import griffe


# Pages of TRL's documentation.
_TRL_PAGES = {"trl.GRPOConfig": "grpo_trainer", "trl.GRPOTrainer": "grpo_trainer", "trl.TrlParser": "script_utils"}


class TRLDocstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = to_google(obj.docstring.value)


def to_google(text: str) -> str:
    text = re.sub(r"\\\\([()\[\]])", r"\\\1", text)
    text = re.sub(r"^> \[!(\w+)\]\n((?:>.*\n?)+)", _admonition, text, flags=re.MULTILINE)
    text = re.sub(r"\[`~(trl\.\w+)`\]", _trl_link, text)
    text = re.sub(r"(\[`[\w.]+`\])(?![\[(])", r"\1[]", text)
    # Types of parameters, whose defaults griffe takes from the signature; then types of return values.
    text = re.sub(r"^( +[\w, *]+ \()(`.+?)(?:, \*optional\*.*)?\):$", _parameter, text, flags=re.MULTILINE)
    return re.sub(r"(?<=^Returns:\n)( +)`([^`]+)`:", r"\1\2:", text, flags=re.MULTILINE)


def _parameter(match: re.Match) -> str:
    return match[1] + match[2].replace("`", "").replace(" or ", " | ") + "):"


def _admonition(match: re.Match) -> str:
    lines = [line.removeprefix(">").strip() for line in match[2].splitlines()]
    return f"{match[1].title()}:\n" + "".join(f"    {line}\n" for line in lines)


def _trl_link(match: re.Match) -> str:
    name = match[1]
    if name not in _TRL_PAGES:
        return f"`{name}`"
    return f"[`{name}`](https://huggingface.co/docs/trl/{_TRL_PAGES[name]}#{name})"
