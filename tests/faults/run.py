"""
Plant one bug at a time in a copy of the package, and see that the tests that should know of it fail:

    python tests/faults/run.py [--only NAME ...] [--list] [--timeout SECONDS]

Each file beside this one is a fault: `what` goes wrong, in one sentence; the `file` of `trl_credit/` it is in; the text
that `was` there, found exactly once; what it `becomes`; and the `tests` that should know, files or node ids in tests/.
`row` is the row of docs/failures.md that it is a case of. A fault is caught if a test fails with it that passes without
it. Faults run in the order in which they are given. The exit status is 1 if one was not caught, or could not be tried.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
# Imported once, before the processes are made in which tests run. Nothing of the package is among them.
_PRELOADED = ["pytest", "datasets", "deepspeed", "peft", "trl.trainer.grpo_trainer", "trl.trainer.sft_trainer"]


@dataclass(frozen=True)
class Fault:
    """A bug, and the tests that should know of it."""

    name: str
    what: str
    file: str
    was: str
    becomes: str
    tests: tuple[str, ...]
    row: int | None = None

    def misfit(self, root: Path = ROOT) -> str | None:
        """Why it cannot be planted in the checkout `root`, or `None`."""
        path = root / "trl_credit" / self.file
        if not path.is_file():
            return f"there is no trl_credit/{self.file}"
        found = path.read_text(encoding="utf-8").count(self.was)
        return None if found == 1 else f"its text is found {found} times in trl_credit/{self.file}, not once"

    def plant(self, root: Path) -> str:
        """Write it into the checkout `root`; returns what was in the file."""
        path = root / "trl_credit" / self.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(self.was, self.becomes), encoding="utf-8")
        return text


def load_faults(folder: Path = FOLDER) -> list[Fault]:
    """All faults of a folder, by name."""
    faults = []
    for path in sorted(folder.glob("*.toml")):
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
        faults.append(Fault(path.stem, **{**fields, "tests": tuple(fields["tests"])}))
    return faults


def _pytest(root: Path, tests: list[str], log: Path) -> None:
    """In a process of its own: run tests of the checkout `root`, and exit as pytest does."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = str(root)
    import pytest

    options = ["-x", "-q", "-m", "", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    # Without what would be done at a usual end: a thread of a library must not outlive its tests.
    sys.stdout.flush()
    os._exit(int(code))


class Tests:
    """The tests of a copy of the checkout."""

    def __init__(self, root: Path, timeout: float):
        self.root, self.timeout = root, timeout
        self.log = root / "tests.log"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_PRELOADED)
        self.passing: set[str] = set()

    def run(self, tests: Iterable[str]) -> int | None:
        """Pytest's exit status, `None` if the time was up."""
        process = self.context.Process(target=_pytest, args=(self.root, list(tests), self.log))
        process.start()
        process.join(self.timeout)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return None
        return process.exitcode

    def pass_without_a_fault(self, test: str) -> bool:
        """Whether a test passes in the copy as it is. Each is run once."""
        if test not in self.passing and self.run([test]) == 0:
            self.passing.add(test)
        return test in self.passing

    def failed(self) -> str | None:
        """The first test that pytest's summary names as failed, all parameters of it."""
        log = self.log.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^(?:FAILED|ERROR) tests/([^\s\[]+)", log, flags=re.MULTILINE)
        return found and found[1]

    def skipped(self) -> bool:
        """Whether pytest skipped a test: for want of a browser, say."""
        last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        return "skipped" in "".join(last)


def _outcome(tests: Tests, fault: Fault) -> tuple[bool, str]:
    """Whether a fault is caught, and by what."""
    if misfit := fault.misfit(tests.root):
        return False, f"DOES NOT APPLY: {misfit}"
    text = fault.plant(tests.root)
    try:
        code = tests.run(fault.tests)
    finally:
        (tests.root / "trl_credit" / fault.file).write_text(text, encoding="utf-8")
    if code == 0:
        return False, "NOT CAUGHT" + (", but tests were skipped" if tests.skipped() else "")
    if code is None:
        return False, f"NO ANSWER in {tests.timeout:g} s"
    failed = tests.failed()
    if code != 1 or failed is None:
        return False, f"THE TESTS DID NOT RUN: pytest exits with {code}"
    # Of a test of which one case is to be run, that case alone.
    case = next((test for test in fault.tests if test.partition("[")[0] == failed), failed)
    if not tests.pass_without_a_fault(case):
        return False, f"FAILS WITHOUT IT TOO: {failed}"
    return True, f"caught by {failed}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults in a copy of the package, and see that tests fail.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    parser.add_argument(
        "--timeout", type=float, default=1200, help="seconds for the tests of a fault (default: %(default)s)"
    )
    args = parser.parse_args()
    by_name = {fault.name: fault for fault in load_faults()}
    if unknown := set(args.only or ()) - set(by_name):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")
    faults = [by_name[name] for name in args.only or by_name]
    if args.list:
        for fault in faults:
            print(f"{fault.name}: {fault.what}")
        return 0

    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        root = Path(folder) / "checkout"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "site", "*.egg-info"))
        tests = Tests(root, args.timeout)
        missed = []
        for number, fault in enumerate(faults, start=1):
            began = time.monotonic()
            caught, how = _outcome(tests, fault)
            print(f"[{number}/{len(faults)}] {fault.name}: {how} ({time.monotonic() - began:.0f} s)", flush=True)
            if not caught:
                missed.append(f"{fault.name}: {how}. {fault.what}")
    minutes = (time.monotonic() - started) / 60
    print(
        f"\n{len(faults)} faults planted, {len(faults) - len(missed)} caught, in {minutes:.0f} minutes.",
        *missed,
        sep="\n",
    )
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
