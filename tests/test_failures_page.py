"""The page of failures of critics names tests that there are, and is the list that tests are numbered by."""

import ast
import re
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs/failures.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| \d", line)]


def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_rows_are_numbered_through():
    assert [row[0] for row in ROWS] == [str(number) for number in range(1, 26)]
    assert all(len(row) == 4 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_names_tests_that_there_are(row):
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row[3])
    assert named and [name for file, name in named if name not in functions(file)] == []


@pytest.mark.parametrize("file", ["test_failures.py", "test_sppo_failures.py"])
def test_every_test_with_a_number_is_in_the_row_of_that_number(file):
    numbered = [name for name in functions(file) if re.match(r"test_\d", name)]
    assert numbered
    for name in numbered:
        for number in re.match(r"test((?:_\d+)+)", name)[1].strip("_").split("_"):
            assert f"`{file}::{name}`" in ROWS[int(number) - 1][3]
