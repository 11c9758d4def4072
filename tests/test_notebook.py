"""The notebook's cells run in their order, at toy size."""

import json
from pathlib import Path

import matplotlib
import pytest


NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebooks" / "quickstart.ipynb"
SMALLER = {
    "STEPS = 60": "STEPS = 2",
    "CRITIC_STEPS = 30": "CRITIC_STEPS = 1",
    "TinyModelSettings()": "TinyModelSettings(hidden_size=32, layers=1, heads=2, steps=20, batch_size=32)",
    "held_out_problems(task, 256)": "held_out_problems(task, 16)",
    "range(4096)": "range(32)",
}


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_kept_without_what_its_cells_put_out():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@pytest.mark.slow
def test_all_cells_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    code = "\n\n".join(cells("code"))
    for usual, small in SMALLER.items():
        assert usual in code, usual
        code = code.replace(usual, small, 1)
    names = {}
    exec(compile(code, str(NOTEBOOK), "exec"), names)
    assert names["trainer"].state.global_step == 2 and names["trainer"].engine.steps == 3
    out = capsys.readouterr().out
    assert "right before: " in out and "right after: " in out
    page = tmp_path / "outputs" / "notebook" / "credit.html"
    assert "VAPO on arithmetic" in page.read_text(encoding="utf-8")
    assert (tmp_path / "outputs" / "notebook" / "curves.png").stat().st_size > 1000
