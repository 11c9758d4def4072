"""`trl-credit inspect`: a page that shows what each token was given."""

from argparse import ArgumentParser
from pathlib import Path

from ..credit_log import BadTable, Right, read_completions, write_page


def make_parser() -> ArgumentParser:
    """The options of `trl-credit inspect`."""
    parser = ArgumentParser(
        prog="trl-credit inspect",
        description="Write an HTML page that shows completions, their tokens coloured by the credit they were given.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run_or_table", metavar="RUN_OR_TABLE", help="folder of a run or of tables, or a table: .parquet or .jsonl")
    add(
        "--compare",
        metavar="OTHER",
        help="another run or table to show beside it: the completions with the same steps, prompts and places",
    )
    add("--output", type=Path, default=Path("credit.html"), help="the page (default: %(default)s)")
    add("--completions", type=int, default=64, help="how many to show, from each (default: %(default)s)")
    add("--steps", type=int, nargs="+", help="only those from these steps (default: spread over all)")
    add(
        "--right_reward",
        metavar="NAME",
        help="reward function that decides what is right; by default what the run decided, else the first or only one",
    )
    add(
        "--right_above",
        type=float,
        help="a completion to which it gives more than this is right; by default 0 or what the run decided",
    )
    return parser


def main(argv: list[str]) -> int:
    """Read, write the page and say where it is; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.completions < 1:
        parser.error(f"--completions must be at least 1, got {args.completions}")
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        parser.error(f"--output must be a file in a folder that exists, got {args.output}")
    try:
        options = {"limit": args.completions, "steps": args.steps, "right": Right(args.right_reward, args.right_above)}
        completions, number = read_completions(args.run_or_table, **options)
        shown = f"{len(completions)} of {number} completions"
        title = completions[0].source
        if args.compare is not None:
            others, number = read_completions(args.compare, **options, like=completions)
            texts = {c.place: c.text for c in completions}
            pairs = [texts[c.place] == c.text for c in others if c.place in texts]
            shown += (
                f", and {len(others)} of {number} to compare them with, {len(pairs)} of the same step, prompt and "
                f"place, {sum(pairs)} of these with the same tokens"
            )
            if others[0].source == title:
                for completion in others:
                    completion.source += " (2)"
            title = f"{title} and {others[0].source}"
            completions += others
    except (BadTable, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    page = write_page(completions, args.output, title)
    cut = page["tokens_left_out"]
    print(f"{args.output}: {shown}, {page['bytes'] / 1e6:.1f} MB" + (f", {cut:,} tokens left out" if cut else ""))
    return 0
