"""No cell of docs/compatibility.md without its test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from compatibility.page import PAGE, load_cells, page

from trl_credit.methods import METHODS


TESTS = Path(__file__).parent
CELLS = load_cells()
NAMED = sorted({test for of_trainers in CELLS.values() for found in of_trainers.values() for test in found.tests})


def test_the_page_is_what_the_cells_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/compatibility/page.py"


def test_every_test_that_a_cell_names_is_there():
    functions = {}
    for test in NAMED:
        file, _, name = test.partition("::")
        if file not in functions:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in functions[file], test


def test_a_cell_without_a_test_is_unknown_or_says_why_there_is_none():
    for feature, of_trainers in CELLS.items():
        assert set(of_trainers) == set(METHODS), feature
        for name, found in of_trainers.items():
            assert (found.kind in ("tested", "refused")) == bool(found.tests), (feature, name)
            assert (found.kind == "none") == bool(found.why), (feature, name)


def test_a_refusal_is_the_test_of_an_error():
    for feature, of_trainers in CELLS.items():
        for name, found in of_trainers.items():
            for test in found.tests if found.kind == "refused" else ():
                file, _, function = test.partition("::")
                tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
                (node,) = [n for n in tree.body if getattr(n, "name", None) == function.partition("[")[0]]
                assert "pytest.raises" in ast.unparse(node), (feature, name)


@pytest.mark.slow
def test_every_test_that_a_cell_names_collects():
    here = [str(TESTS / test) for test in NAMED if not test.startswith("with_vllm")]  # they have another environment
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", *here]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert f"{len(here)} tests collected" in found.stdout
