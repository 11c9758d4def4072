import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import trl_credit


def run(code: str):
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_import_is_instant_and_needs_none_of_the_heavy_packages():
    code = """
import json, sys, time
start = time.perf_counter()
import trl_credit
seconds = time.perf_counter() - start
heavy = ("torch", "trl", "transformers", "vllm", "peft", "deepspeed")
print(json.dumps([seconds, [name for name in heavy if name in sys.modules]]))
"""
    runs = [run(code) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.2
    assert all(loaded == [] for _, loaded in runs)


@pytest.mark.slow
def test_trainers_need_no_optional_package():
    code = """
import json, sys
for name in ("vllm", "deepspeed", "matplotlib", "math_verify"):
    sys.modules[name] = None  # importing it is an error
import trl_credit
print(json.dumps([getattr(trl_credit, name).__name__ for name in trl_credit.__all__ if name != "__version__"]))
"""
    assert run(code) == [name for name in trl_credit.__all__ if name != "__version__"]


def test_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'GRPOLambda'; it offers .*GRPOLambdaTrainer"):
        trl_credit.GRPOLambda  # noqa: B018


def test_every_public_name_has_a_docstring():
    for name in trl_credit.__all__:
        if name != "__version__":
            assert len(getattr(trl_credit, name).__doc__) > 100, name


def test_static_tools_find_every_name_where_it_is():
    """What is under `TYPE_CHECKING` is what is imported when a name is asked for."""
    (block,) = [
        node
        for node in ast.parse(inspect.getsource(trl_credit)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    stated = {alias.asname: f"trl_credit.{node.module}" for node in block.body for alias in node.names}
    assert stated == trl_credit._LAZY


def test_the_citation_is_of_this_version():
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {trl_credit.__version__}\n" in citation
