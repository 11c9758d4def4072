"""The faults in `tests/faults` fit the package as it is, and name tests that there are; `run.py` there plants them."""

import ast
from collections import Counter

from faults.run import ROOT, load_faults

from trl_credit.methods import METHODS


FAULTS = load_faults()


def test_every_fault_can_be_planted_and_changes_something():
    assert [f"{fault.name}: {misfit}" for fault in FAULTS if (misfit := fault.misfit())] == []
    assert [fault.name for fault in FAULTS if fault.was == fault.becomes] == []


def test_what_a_fault_leaves_is_still_python():
    for fault in FAULTS:
        if fault.file.endswith(".py"):
            text = (ROOT / "trl_credit" / fault.file).read_text(encoding="utf-8")
            ast.parse(text.replace(fault.was, fault.becomes), filename=fault.name)


def test_every_fault_names_tests_that_there_are():
    functions = {}
    for test in sorted({test for fault in FAULTS for test in fault.tests}):
        file, _, name = test.partition("::")
        if file not in functions:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in functions[file], test


def test_every_room_and_every_row_of_the_failures_has_a_fault():
    assert len(FAULTS) >= 60
    rooms = Counter(fault.file.split("/")[0] for fault in FAULTS)
    folders = {path.parent.name for path in (ROOT / "trl_credit").glob("*/*") if path.suffix in (".py", ".yaml")}
    assert folders - set(rooms) == set()
    trainers = {fault.file.split("/")[1] for fault in FAULTS if fault.file.startswith("trainers/")}
    assert {method.folder for method in METHODS.values()} - trainers == set()
    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    numbers = {
        int(line.split()[1]) for line in page.splitlines() if line.startswith("| ") and line.split()[1].isdigit()
    }
    assert {fault.row for fault in FAULTS} - {None} == numbers
