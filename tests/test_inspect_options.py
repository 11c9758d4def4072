"""What `trl-credit inspect` is asked is what is on its page."""

import json
import re

import pytest

from trl_credit.cli import main


ROWS = [
    {"step": step, "tokens": ["a", "b"], "reward": style + right, "rewards": {"style": style, "right": right}}
    for step, style, right in ((1, 0.2, 0.0), (1, 0.6, 0.9), (2, 0.9, 0.1), (3, 0.3, 0.6))
]


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ([], [True, True, True, True]),
        (["--right_above", "0.5"], [False, True, True, False]),
        (["--right_reward", "right"], [False, True, True, True]),
        (["--right_reward", "right", "--right_above", "0.5"], [False, True, False, True]),
        (["--right_above", "0.6"], [False, False, True, False]),  # what is at the threshold is not above it
        (["--steps", "1", "3", "--right_above", "0.5"], [False, True, False]),
        (["--completions", "1", "--steps", "2"], [True]),
    ],
)
def test_every_option_reaches_the_page(options, right, tmp_path):
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    page = tmp_path / "page.html"
    assert main(["inspect", str(tmp_path / "table.jsonl"), "--output", str(page), *options]) == 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[1])
    assert [completion["right"] for completion in data["completions"]] == right
