"""A grid of runs from a YAML file: what is done is not run again."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from .cell import Cell, write
from .tasks import prepare


_SHARED = {field.name for field in fields(Cell)} - {"method", "trainer", "task", "fit", "seed", "settings"}


def read_grid(path: Path) -> list[Cell]:
    """
    The cells of a grid.

    The file has `tasks`, `fits` and `seeds`, lists; `methods`, a list of mappings with a `name`, a `trainer`, its
    `settings`, and a `sweep` of settings with several values, each of which is a method of its own; and any further
    fields of [`Cell`], which a method may have of its own too.
    """
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    shared = {name: value for name, value in grid.items() if name not in ("tasks", "fits", "seeds", "methods")}
    _refuse_unknown(path, shared, _SHARED)
    cells = []
    for method in grid["methods"]:
        own = {name: method[name] for name in method if name not in ("name", "trainer", "settings", "sweep")}
        _refuse_unknown(path, own, _SHARED | {"tasks", "fits", "seeds"})
        axes = {name: own.pop(name, grid.get(name)) for name in ("tasks", "fits", "seeds")}
        for name, swept in _swept(method):
            for task, fit, seed in itertools.product(*axes.values()):
                settings = {**method.get("settings", {}), **swept}
                cells.append(Cell(name, method["trainer"], task, fit, seed, settings=settings, **{**shared, **own}))
    return cells


def _swept(method: dict) -> Iterator[tuple[str, dict]]:
    sweep = method.get("sweep", {})
    for values in itertools.product(*sweep.values()):
        swept = dict(zip(sweep, values, strict=True))
        name = ", ".join([method["name"], *(f"{key} {value}" for key, value in swept.items())])
        yield name, swept


def _refuse_unknown(path: Path, given: dict, known: set[str]) -> None:
    if unknown := given.keys() - known:
        raise ValueError(f"{path}: {sorted(unknown)} is not known here; there are {sorted(known)}.")


def run_grid(cells: list[Cell], results: Path, cache: Path, jobs: int = 1, on_done=lambda cell, done: None) -> pa.Table:
    """
    Run the cells that are not in `results` yet, and add them to it.

    Each finished cell lies in a file of its own beside `results` until all are done, so that whatever interrupts the
    grid costs the cells under way and no others.

    Args:
        cells (`list[Cell]`):
            What to run.
        results (`Path`):
            A parquet file; made if it is not there.
        cache (`Path`):
            Where start models are kept.
        jobs (`int`, *optional*, defaults to `1`):
            Processes, of one thread each.
        on_done (`Callable`, *optional*):
            Called with each cell and how many are done.
    """
    folder = results.with_suffix(".cells")
    tables = [pq.read_table(results)] if results.exists() else []
    tables += [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    done = {key for table in tables for key in table["cell"].unique().to_pylist()}
    left = list({cell.key: cell for cell in cells if cell.key not in done}.values())
    if not left:
        return pa.concat_tables(tables, promote_options="permissive")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        # Start models first, for no two processes should make the same.
        for fit in [pool.submit(prepare, *which, cache) for which in dict.fromkeys((c.task, c.fit) for c in left)]:
            fit.result()
        futures = {pool.submit(_run, cell, cache, folder / f"{cell.key}.parquet"): cell for cell in left}
        for number, future in enumerate(as_completed(futures), start=1):
            tables.append(future.result())
            on_done(futures[future], number)
    table = pa.concat_tables(tables, promote_options="permissive")
    write(table, results)
    for path in folder.glob("*.parquet"):
        path.unlink()
    if folder.exists():
        folder.rmdir()
    return table


def _run(cell: Cell, cache: Path, path: Path) -> pa.Table:
    table = cell.run(cache)
    write(table, path)
    return table
