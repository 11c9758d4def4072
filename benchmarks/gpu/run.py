"""
What is to be measured as soon as a GPU is at hand, most important first, in 25 minutes and with nothing to download.

    python benchmarks/gpu/run.py --output outputs/gpu.json
    python benchmarks/gpu/make_table.py outputs/gpu.json --output outputs/gpu.md

Every job is a process of its own. Its result is in the file as soon as it ends, so that a run that is cut off keeps
what it has; a second run with the same file makes the jobs that are missing. A job that there is no time for is left
out, and one that fails is written down with its error. `--toy` runs everything at toy size on a CPU and in this
process, to see that nothing is broken.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from shapes import LENGTHS, SHAPES, TRAINERS  # noqa: E402


class Job(NamedTuple):
    """
    One measurement.

    Args:
        name (`str`):
            Its place in the results.
        argv (`tuple[str, ...]`):
            Script of this folder, and arguments.
        seconds (`int`):
            What it will take at most; it is not begun with less time left.
    """

    name: str
    argv: tuple[str, ...]
    seconds: int


def jobs(toy: bool) -> list[Job]:
    """All, in the order of what matters most. There is one toy size."""
    shapes, lengths = (list(SHAPES)[:1], LENGTHS[:1]) if toy else (SHAPES, LENGTHS)
    found = [Job("kernels", ("precision.py",), 60)]
    steps = [
        Job(
            f"step {shape} {length} {trainer}",
            ("training_steps.py", shape, str(length), trainer),
            60 if shape == "0.5B" else 100,
        )
        for shape in shapes
        for length in lengths
        for trainer in TRAINERS
    ]
    # Small and large first for GRPO and the critic as large as the policy: they answer most.
    first = [job for job in steps if job.argv[-1] in ("grpo", "vapo")]
    found += first + [job for job in steps if job not in first]
    found += [Job("logits", ("tiled_logits.py",), 60), Job("attention", ("packed_attention.py",), 90)]
    found += [Job(f"learning {trainer}", ("task_learning.py", trainer), 60) for trainer in ("grpo", "vapo")]
    return found


def run(job: Job, seconds_left: float) -> dict:
    """What the job prints in its last line, as JSON, or why there is nothing."""
    argv = [sys.executable, str(HERE / job.argv[0]), *job.argv[1:], "--seconds", str(int(seconds_left))]
    one_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": one_gpu}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds_left, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"cut off after {seconds_left:.0f} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-1000:]}
    return json.loads(done.stdout.splitlines()[-1])


def run_toy(job: Job) -> dict:
    """The same at toy size and in this process, for the sake of the imports."""
    path, output = str(HERE / job.argv[0]), io.StringIO()
    argv, sys.argv = sys.argv, [path, *job.argv[1:], "--toy"]
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(path, run_name="__main__")
    except Exception:
        return {"error": traceback.format_exc()[-1000:]}
    finally:
        sys.argv = argv
    return json.loads(output.getvalue().splitlines()[-1])


def about(toy: bool) -> dict:
    """Where this is measured."""
    cuda = torch.cuda.is_available() and not toy
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "dtype": "bfloat16 on float32 weights" if cuda else "float32",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "toy": toy,
    }


def save(results: dict, file: Path) -> None:
    """Whole, or as it was."""
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(results, indent=1), encoding="utf-8")
    beside.replace(file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="jobs whose names begin with one of these")
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU")
    args = parser.parse_args(argv)
    if not args.toy and not torch.cuda.is_available():
        parser.error("there is no GPU here; --toy runs on a CPU")
    results = {"about": about(args.toy), "jobs": {}}
    if args.output.exists():
        stored = json.loads(args.output.read_text(encoding="utf-8"))
        same = ("device", "dtype", "torch", "toy")
        if any(stored["about"][name] != results["about"][name] for name in same):
            parser.error(f"{args.output} holds results of another machine: {stored['about']}")
        results = stored
    args.output.parent.mkdir(parents=True, exist_ok=True)
    end = time.time() + 60 * args.minutes
    for job in jobs(args.toy):
        wanted = not args.only or job.name.startswith(tuple(args.only))
        if not wanted or "error" not in results["jobs"].get(job.name, {"error": ""}):
            continue
        started = time.time()
        if args.toy:
            result = run_toy(job)
        elif end - started < job.seconds:
            result = {"error": "no time was left"}
        else:
            result = run(job, end - started)
        results["jobs"][job.name] = {**result, "wall_s": round(time.time() - started, 1)}
        save(results, args.output)
        print(f"{job.name}: {result.get('error', 'done')}", flush=True)
    return int(any("error" in result for result in results["jobs"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
