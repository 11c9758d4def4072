"""What a user of the wheel relies on; `.ci/run` starts it in an environment that has nothing but the wheel."""

import importlib
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path


start = time.perf_counter()
import trl_credit  # noqa: E402


seconds = time.perf_counter() - start
assert seconds < 0.2, f"import trl_credit took {seconds:.2f} s"
assert not {"torch", "trl", "vllm", "peft", "deepspeed"} & set(sys.modules), "import trl_credit is lazy"
assert Path(trl_credit.__file__).is_relative_to(sysconfig.get_paths()["purelib"]), trl_credit.__file__
source, shipped = Path(__file__).parents[1] / "trl_credit", Path(trl_credit.__file__).parent
files = {str(path.relative_to(source)) for path in source.rglob("*.*") if path.suffix != ".pyc"}
left_out = sorted(file for file in files if not (shipped / file).exists())
assert not left_out and {"py.typed", "credit_log/assets/viewer.html", "recipes/vapo.yaml"} <= files, left_out
for name in trl_credit.__all__:
    assert getattr(trl_credit, name) is not None

command = Path(sys.executable).with_name("trl-credit")
environment = subprocess.run([command, "env"], check=True, capture_output=True, text=True).stdout
assert f"trl_credit version: {trl_credit.__version__}" in environment, environment
help_text = subprocess.run([command, "grpo-lambda", "--help"], check=True, capture_output=True, text=True).stdout
assert "--trace_lambda" in help_text
assert importlib.import_module("trl_credit.trl_seam").CreditTrainer.__module__ == "trl_credit.seam.trainer"
with tempfile.TemporaryDirectory() as folder:
    table, page = Path(folder, "table.jsonl"), Path(folder, "page.html")
    table.write_text('{"tokens": ["a"], "advantage": [1]}')
    subprocess.run([command, "inspect", table, "--output", page], check=True, capture_output=True)
    assert '"texts":["a"]' in page.read_text(encoding="utf-8")
print(f"wheel {trl_credit.__version__}: ok, imported in {1000 * seconds:.0f} ms")
