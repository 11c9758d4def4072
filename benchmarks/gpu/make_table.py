"""
Tables of what `run.py` has measured, for the pages.

    python benchmarks/gpu/make_table.py outputs/gpu.json --output outputs/gpu.md
"""

import argparse
import json
from pathlib import Path


def tables(results: dict) -> str:
    """Markdown. What is missing is said, with its reason."""
    about, done = results["about"], results["jobs"]
    found = {name: result for name, result in done.items() if "error" not in result and "left_out" not in result}
    lines = [
        f"Measured by `python benchmarks/gpu/run.py` on {about['device']}, {about['dtype']}, torch {about['torch']}, "
        f"{about['date']}.",
    ]
    if "kernels" in found:
        rows, tokens = found["kernels"]["shape"]
        lines += ["", f"Against float64, {rows} × {tokens}:", "", "| | dtype | max. error / max. value | ms |"]
        lines += ["| --- | --- | --- | --- |"]
        for row in found["kernels"]["rows"]:
            lines.append(f"| {row['what']} | {row['dtype']} | {row['error']:.1e} | {1e3 * row['seconds']:.2f} |")
    steps = [result for name, result in found.items() if name.startswith("step ")]
    if steps:
        lines += ["", "An optimizer step without generation, two completions:", ""]
        lines += ["| model | tokens | trainer | seconds | × GRPO | critic's update | peak, GiB | planned, GiB |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        grpo = {(row["shape"], row["tokens"]): row["step_s"] for row in steps if row["trainer"] == "grpo"}
        for row in steps:
            base = grpo.get((row["shape"], row["tokens"]))
            ratio = f"{row['step_s'] / base:.2f}" if base else ""
            peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
            lines.append(
                f"| {row['shape']} | {row['tokens']} | `{row['trainer']}` | {row['step_s']:.2f} | {ratio} | "
                f"{row['critic_update_s'] / row['step_s']:.0%} | {peak} | {row['planned_gib']:.1f} |"
            )
    for name, arms in (("logits", ("whole", "tiles")), ("attention", ("sdpa", "flex_attention"))):
        if name not in found:
            continue
        lines += ["", f"| {name}, tokens | " + " | ".join(f"{arm}: seconds | GiB | loss" for arm in arms) + " |"]
        lines += ["| --- |" + " --- | --- | --- |" * len(arms)]
        for row in found[name]["rows"]:
            cells = [f"{row[arm]['seconds']:.3f} | {row[arm]['peak_gib']:.2f} | {row[arm]['loss']:.4f}" for arm in arms]
            lines.append(f"| {row['tokens']} | " + " | ".join(cells) + " |")
    learning = [result for name, result in found.items() if name.startswith("learning ")]
    if learning:
        lines += ["", "| task | trainer | steps | mean reward, first | last |", "| --- | --- | --- | --- | --- |"]
        for row in learning:
            lines.append(
                f"| {row['task']} | `{row['trainer']}` | {row['steps']} | {row['first']:.3f} | {row['last']:.3f} |"
            )
    absent = [
        f"{name} ({(result.get('error') or result['left_out']).splitlines()[-1]})"
        for name, result in done.items()
        if name not in found
    ]
    if absent:
        lines += ["", f"Not measured: {'; '.join(absent)}."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = tables(json.loads(args.results.read_text(encoding="utf-8")))
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
