"""
python -m benchmarks.credit run benchmarks/credit/grids/first_look.yaml --jobs 2
python -m benchmarks.credit table docs/results/credit_first_look.parquet --against GRPO
python -m benchmarks.credit noise scoreboard
"""

import argparse
import json
from pathlib import Path

import pyarrow.parquet as pq

from . import report
from .grid import read_grid, run_grid
from .noise import measure_noise


RESULTS = Path(__file__).parents[2] / "docs" / "results"
CACHE = Path("outputs") / "credit_fits"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.credit", description="What finer credit buys.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="Run the cells of a grid that are not done yet.")
    run.add_argument("grid", type=Path)
    run.add_argument("--results", type=Path, help="Parquet file. Default: docs/results/credit_GRID.parquet.")
    run.add_argument("--jobs", type=int, default=1, help="Processes, of one thread each.")
    table = commands.add_parser("table", help="Tokens to thresholds, by method.")
    table.add_argument("results", type=Path)
    table.add_argument("--against", nargs="*", default=(), help="The methods to compare with.")
    table.add_argument("--thresholds", type=float, nargs="+", default=[0.4, 0.6, 0.8])
    noise = commands.add_parser("noise", help="Headroom of a task and gradient noise of estimators, at one policy.")
    noise.add_argument("task")
    noise.add_argument("--fit", type=int, default=0)
    noise.add_argument("--completions", type=int, default=4096)
    noise.add_argument("--tokens", type=int, default=0, help="Train with the oracle for so many tokens first.")
    for command in (run, noise):
        command.add_argument("--cache", type=Path, default=CACHE, help="Where start models are kept.")
    args = parser.parse_args(arguments)

    if args.command == "run":
        cells = read_grid(args.grid)
        results = args.results or RESULTS / f"credit_{args.grid.stem}.parquet"
        print(f"{len(cells)} cells, to {results}", flush=True)
        run_grid(
            cells,
            results,
            args.cache,
            args.jobs,
            lambda cell, done: print(
                f"{done}: {cell.task}, {cell.method}, fit {cell.fit}, seed {cell.seed}", flush=True
            ),
        )
    elif args.command == "table":
        results = pq.read_table(args.results)
        for task in results["task"].unique().to_pylist():
            of_task = results.filter([value == task for value in results["task"].to_pylist()])
            print(f"**{task}**\n\n{report.table(of_task, args.thresholds, args.against)}\n\n{report.ends(of_task)}\n")
    else:
        print(json.dumps(measure_noise(args.task, args.fit, args.completions, args.cache, args.tokens), indent=1))


if __name__ == "__main__":
    main()
