"""The floors of the house: an import points down or stays in its room, and the page names every room."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_credit"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
# From the ground up. Modules of one floor do not import each other's rooms.
FLOORS = (
    {"options", "methods", "credit", "journal", "saved", "model_card"},
    {"sampling", "segmenting", "planner"},
    {"credit_log"},
    {"seam"},
    {"critics"},
    {"trainers"},
    {"critic_report", "toy", "scripts"},
    {"cli"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Old names, which are found where they have gone to, and the front door.
OUTSIDE = {"moved", "__init__"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)


MODULES = {
    path: module_of(path) for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "__init__"
}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path, is_lazy_too: bool) -> set[str]:
    """Modules of the package that a file imports; those under `TYPE_CHECKING` are not imported."""
    module, known = MODULES[path], set(MODULES.values())
    package = module if path.name in ("__init__.py", "__main__.py") else module.rpartition(".")[0]
    found, stack = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not is_lazy_too:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {
                name if (name := f"{source}.{alias.name}") in known else source
                for alias in node.names
                if alias.name != "*"
            }
        stack.extend(ast.iter_child_nodes(node))
    return {name for name in found if name in known and name != module}


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES.values()} - OUTSIDE == set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=MODULES.get)
def test_no_arrow_points_up(path):
    room = room_of(MODULES[path])
    if room in OUTSIDE:
        return
    for other in imports(path, is_lazy_too=room != "cli"):
        other = room_of(other)
        if other not in OUTSIDE and other != room:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{MODULES[path]} imports {other}"


def test_no_module_imports_itself_by_others():
    """A circle of imports, lazy ones left out: those are how a circle is broken."""
    arrows = {module: imports(path, is_lazy_too=False) for path, module in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in finished:
            for other in arrows[module]:
                visit(other, [*way, module])
            finished.add(module)

    for module in arrows:
        visit(module, [])


def test_the_test_sees_relative_absolute_and_lazy_imports(tmp_path, monkeypatch):
    file = PACKAGE / "critics" / "seen.py"
    monkeypatch.setitem(MODULES, file, "trl_credit.critics.seen")
    text = """
from ..seam import CreditConfig
from trl_credit.credit import gae
from . import token
import trl_credit.journal
if TYPE_CHECKING:
    from ..cli import main
def lazy():
    from ..trainers.vapo import VAPOTrainer
"""
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: text)
    at_once = {"trl_credit.seam", "trl_credit.credit.gae", "trl_credit.critics.token", "trl_credit.journal"}
    assert imports(file, is_lazy_too=False) == at_once
    assert imports(file, is_lazy_too=True) == at_once | {"trl_credit.trainers.vapo"}


@pytest.mark.parametrize("path", MODULES, ids=MODULES.get)
def test_no_file_is_above_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_page_names_every_entry_of_the_package():
    entries = [path for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name != "py.typed"]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in entries]
    assert [name for name in names if f"| `{name}" not in PAGE and f", `{name}" not in PAGE] == []
