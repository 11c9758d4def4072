"""
MkDocs hook: `<!-- options: module.Config -->` on a line becomes a table of the options that the config's docstring
describes. It is read from the source, so that building the site imports no trainer.
"""

import ast
import re
from pathlib import Path

from trl_credit.options import documented_options


ROOT = Path(__file__).parents[2]


def on_page_markdown(markdown: str, **kwargs) -> str:
    return re.sub(r"^<!-- options: ([\w.]+)\.(\w+) -->$", lambda match: table(*match.groups()), markdown, flags=re.M)


def table(module: str, config: str) -> str:
    """The table of a config's options."""
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    (docstring,) = [
        ast.get_docstring(node)
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == config
    ]
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for name, (kind, text) in documented_options(docstring).items():
        default = kind.partition("defaults to ")[2].replace('"', "")
        text = re.sub(r"\[`~([\w.]+?)(\w+)`\]", r"[`\2`][\1\2]", text).replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {text} |")
    return "\n".join(rows)
