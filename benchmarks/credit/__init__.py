"""What finer credit buys: trainers on tasks with known values, from one grid of runs. See `docs/benchmarks.md`."""
