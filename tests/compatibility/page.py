"""Write docs/compatibility.md from cells.toml:   python tests/compatibility/page.py"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from trl_credit.methods import METHODS


FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parents[1] / "docs" / "compatibility.md"
INTRODUCTION = """\
# What works with what

Made from the tests by `python tests/compatibility/page.py`; do not edit it. Below are the tests that a row stands for.
Each asserts that the engine or the feature was on, not only that a run ended. `bash tests/run.sh` runs them all.

- **✓** tested, on the CPU with tiny models: two processes and gloo where there is an engine, vLLM's CPU build where
  there is vLLM.
- **refused**: an error before anything is generated, which a test reads.
- **–** does not apply.
- **?** unknown: no test. It may well work.

No cell has been tested on a GPU yet.
"""


@dataclass(frozen=True)
class Cell:
    """What is known of a trainer and a feature: the tests that show it, unless there is nothing to test."""

    kind: str  # "tested", "refused", "none" or "unknown"
    tests: tuple[str, ...] = ()
    why: str = ""

    @property
    def mark(self) -> str:
        return {"tested": "✓", "refused": "refused", "none": "–", "unknown": "?"}[self.kind]


def cell(value, name: str) -> Cell:
    if isinstance(value, dict):
        ((kind, value),) = value.items()
        if kind == "none":
            return Cell("none", why=value)
        return Cell(kind, (value.format(name=name),))
    tests = [value] if isinstance(value, str) else value or []
    return Cell("tested" if tests else "unknown", tuple(test.format(name=name) for test in tests))


def load_cells() -> dict[str, dict[str, Cell]]:
    """By feature and trainer."""
    table = tomllib.loads((FOLDER / "cells.toml").read_text(encoding="utf-8"))
    return {
        feature: {name: cell(given.get(name, given.get("all")), name) for name in METHODS}
        for feature, given in table.items()
    }


def anchor(feature: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", feature.lower()).strip("-")


def page() -> str:
    cells = load_cells()
    names = [method.name for method in METHODS.values()]
    lines = [INTRODUCTION, "| | " + " | ".join(names) + " |", "| --- |" + " :-: |" * len(names)]
    for feature, of_trainers in cells.items():
        marks = [found.mark for found in of_trainers.values()]
        lines.append(f"| [{feature}](#{anchor(feature)}) | " + " | ".join(marks) + " |")
    lines += ["", "## The tests"]
    for feature, of_trainers in cells.items():
        lines += ["", f"### {feature} {{ #{anchor(feature)} }}", ""]
        unknown = [METHODS[name].name for name, found in of_trainers.items() if found.kind == "unknown"]
        for name, found in of_trainers.items():
            shown = found.why or "<br>".join(f"`{test}`" for test in found.tests)
            if found.kind != "unknown":
                lines.append(f"- {METHODS[name].name}, {found.kind if found.tests else 'does not apply'}: {shown}")
        if unknown:
            lines.append(f"- unknown: {', '.join(unknown)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
