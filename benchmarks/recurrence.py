"""
Time of `linear_recurrence` against a Python loop over T, and its error against float64.

    python benchmarks/recurrence.py --output docs/results/recurrence.md

The two run in turn in one process; each figure is the median of the runs.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from trl_credit import linear_recurrence


def python_loop(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """The obvious implementation, with the slicing moved out of the loop."""
    carry, out = torch.zeros_like(x[:, 0]), []
    for x_t, decay_t in zip(x.unbind(1), decay.expand_as(x).unbind(1), strict=True):
        carry = carry * decay_t + x_t
        out.append(carry)
    return torch.stack(out, 1)


def time_in_turn(functions, arguments, runs: int, device: torch.device) -> list[list[float]]:
    times = [[] for _ in functions]
    for run in range(runs + 1):
        for function, result in zip(functions, times, strict=True):
            start = time.perf_counter()
            function(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:  # the first one warms up
                result.append(time.perf_counter() - start)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {args.threads} threads"
    lines = [
        f"Measured by `python benchmarks/recurrence.py` on {name}, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}; medians of {args.runs} runs in turn, range in brackets.",
        "",
        "| shape | decay | loop over T | `linear_recurrence` | ratio | max. error / max. value |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape in ((16, 1024), (64, 8192), (32, 32768)):
        x = torch.randn(shape, device=device)
        for kind, decay in {
            "scalar": torch.tensor([[0.99]], device=device),
            "per row": 0.9 + 0.1 * torch.rand(shape[0], 1, device=device),
            "per token": 0.9 + 0.1 * torch.rand(shape, device=device),
        }.items():
            loop, ours = time_in_turn((python_loop, linear_recurrence), (x, decay), args.runs, device)
            exact = python_loop(x.double(), decay.double())
            error = ((linear_recurrence(x, decay) - exact).abs().max() / exact.abs().max()).item()
            ratio = statistics.median(a / b for a, b in zip(loop, ours, strict=True))
            cells = [
                f"{1e3 * statistics.median(t):.2f} ms [{1e3 * min(t):.2f}, {1e3 * max(t):.2f}]" for t in (loop, ours)
            ]
            lines.append(f"| {shape} | {kind} | {cells[0]} | {cells[1]} | {ratio:.0f}× | {error:.1e} |")
            print(lines[-1], flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
