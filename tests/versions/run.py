"""
Make an environment of each set of versions in sets.toml, run the tests there, and record what came of it:

    python tests/versions/run.py [SET ...] [--tests short|seam|quick] [--failed] [--folder DIR] [--page]

An environment takes all that its set does not pin from the one that this runs in, so that it is made in seconds, once;
one of another Python is made anew by examples/install.sh, with the interpreter `pythonX.Y` of the path or of pyenv.
`short` are TRL's private names, that λ = 0 is GRPO bit for bit, and some runs that are resumed; `seam` is all of the
seam's tests, and runs of every trainer, resumed and not, and with the Hub; `quick`, the default, is the quick tier and
the same runs. `--failed` runs again what failed the last time. Results go to docs/results/versions.json and the page
beside it; `--page` writes the page alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
from datetime import date
from pathlib import Path
from xml.etree import ElementTree


ROOT = Path(__file__).resolve().parents[2]
SETS = Path(__file__).with_name("sets.toml")
RESULTS = ROOT / "docs" / "results" / "versions.json"
PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "datasets", "deepspeed")
SEAM = ["test_seam.py", "test_seam_contract.py", "test_seam_critic.py", "test_seam_sampling.py"]
SEAM += ["test_versions.py", "test_equals_grpo.py", "test_resume_amid_rollout.py"]
NOT_SLOW = ["-m", "not slow and not distributed and not vllm"]
SHORT = [
    "test_seam.py",
    "test_seam_critic.py",
    "test_versions.py",
    "test_seam_contract.py::test_two_micro_batches_of_unequal_lengths_have_the_loss_and_gradient_of_one_batch",
    "test_equals_grpo.py::test_no_trace_and_no_clamp_is_grpo_bit_for_bit",
    *(
        f"test_compatibility.py::test_a_resumed_run_is_the_run_to_the_bit[{name}]"
        for name in ("grpo-lambda", "vineppo", "vapo", "sppo")
    ),
]
# Every trainer, resumed and not, and the Hub.
RUNS = [
    "test_compatibility.py::test_one_process_moves_every_weight_of_every_network",
    "test_compatibility.py::test_a_resumed_run_is_the_run_to_the_bit",
    "test_hub.py::test_published_weights_are_the_final_weights_bit_for_bit",
]
STAGES = {
    "short": [(SHORT, ["-m", ""])],
    "seam": [(SEAM, NOT_SLOW), (RUNS, ["-m", "slow"])],
    "quick": [([""], NOT_SLOW), (RUNS, ["-m", "slow"])],
}


def make_environment(folder: Path, pins: list[str], python: str | None) -> Path:
    """An environment with these packages; its interpreter."""
    interpreter = folder / "bin" / "python"
    made, what = folder / "made", " ".join([*pins, str(python)])
    if made.exists() and made.read_text() == what:
        return interpreter
    install = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python is None or python == here:
        venv.create(folder, clear=True, symlinks=True)
        own = folder / "lib" / f"python{here}" / "site-packages"
        (own / "others.pth").write_text(sysconfig.get_path("purelib"))
        command = [sys.executable, "-m", "pip", "--python", str(interpreter), *install[2:], *pins]
        subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    else:
        found = shutil.which(f"python{python}") or next(
            Path.home().glob(f".pyenv/versions/{python}.*/bin/python"), None
        )
        if found is None:
            raise FileNotFoundError(f"There is no python{python} here.")
        make = ["bash", str(ROOT / "examples" / "install.sh"), str(folder), "test"]
        subprocess.run(make, check=True, env={**os.environ, "PYTHON": str(found)})
        subprocess.run([str(interpreter), *install, *pins], check=True)
    made.write_text(what)
    return interpreter


def versions_in(interpreter: Path) -> dict[str, str]:
    code = (
        "import json, platform; from importlib.metadata import version\n"
        f"print(json.dumps({{'python': platform.python_version(), **{{p: version(p) for p in {PACKAGES!r}}}}}))"
    )
    found = subprocess.run([str(interpreter), "-c", code], check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


def run_tests(interpreter: Path, stages, environment: dict[str, str]) -> dict:
    """How many of the tests passed and were skipped, and which failed."""
    report = interpreter.parent.parent / "report.xml"
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    counts = {"passed": 0, "skipped": 0, "failed": []}
    for files, options in stages:
        command = [str(interpreter), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *options]
        command += [str(ROOT / "tests" / file) for file in files]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **path, **environment}, check=False)
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                file = case.get("classname").removeprefix("tests.").replace(".", "/")
                counts["failed"].append(f"{file}.py::{case.get('name')}")
            else:
                counts["skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def read_results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def write_page() -> None:
    lines = [
        "Sets of versions that were tried, each in an environment of its own, by `python tests/versions/run.py`, which",
        "writes this table; `tests/versions/sets.toml` says what each set pins. *short* are the tests of TRL's private",
        "names, that λ = 0 is GRPO bit for bit, and some runs that are resumed; *seam* is all of the seam's tests, and",
        "runs of every trainer, resumed and not, and with the Hub; *quick* is the quick tier and the same runs.",
        "",
        "| set | " + " | ".join(("Python", *PACKAGES)) + " | tests | passed | skipped | failed | minutes | date |",
        "| --- |" + " --- |" * (len(PACKAGES) + 7),
    ]
    notes = []
    for name, result in read_results().items():
        numbers = [result["passed"], result["skipped"], len(result["failed"]), round(result["seconds"] / 60, 1)]
        cells = [name, *result["versions"].values(), result["tests"], *map(str, numbers), result["date"]]
        lines.append("| " + " | ".join(cells) + " |")
        if result["failed"]:
            notes += ["", f"Failed with the set {name}: " + ", ".join(f"`{test}`" for test in result["failed"]) + "."]
    text = "\n".join([*lines, *notes]) + "\n"
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")


def main() -> int:
    sets = tomllib.loads(SETS.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=[*sets, []], metavar="SET", help="all unless named")
    parser.add_argument("--tests", choices=list(STAGES))
    parser.add_argument("--failed", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    failed = 0
    for name in [] if args.page else args.sets or sets:
        given, tests = sets[name], args.tests or sets[name].get("tests", "quick")
        folder = (args.folder / name.lower().replace(" ", "-")).resolve()
        interpreter = make_environment(folder, given["pins"], given.get("python"))
        before = read_results()[name] if args.failed else {"passed": 0, "seconds": 0, "skipped": 0, "tests": tests}
        stages = [(before["failed"], ["-m", ""])] if args.failed else STAGES[tests]
        start = time.monotonic()
        counts = run_tests(interpreter, stages, given.get("environment", {}))
        counts |= {kind: counts[kind] + before[kind] for kind in ("passed", "skipped")}
        seconds = before["seconds"] + round(time.monotonic() - start)
        results = read_results()  # others may have run in the meantime
        results[name] = {
            "versions": versions_in(interpreter),
            "tests": before["tests"],
            **counts,
            "seconds": seconds,
            "date": str(date.today()),
        }
        ordered = {known: results[known] for known in sets if known in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        write_page()
        failed += len(counts["failed"])
    if args.page:
        write_page()
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
