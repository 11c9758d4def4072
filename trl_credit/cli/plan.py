"""`trl-credit plan`: how much memory a run will take, and where its time will go."""

import sys
from argparse import ArgumentParser

from ..planner.setup import PLANNED_METHODS, PROBE, SHARDINGS


def make_parser() -> ArgumentParser:
    """The options of `trl-credit plan`."""
    parser = ArgumentParser(
        prog="trl-credit plan",
        description="Say how much memory a run will take on each GPU, what it is for and when, where the time will go, "
        "and what to change if it does not fit. Only config.json is read; nothing is loaded or trained.",
        epilog="Memory is held against measured peaks on a CPU (docs/results/plan.md). Times are estimates.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH_OR_ID", help="folder with a config.json, such a file, or Hub id")
    add("--method", required=True, choices=PLANNED_METHODS, help="what is trained with")
    add(
        "--critic",
        metavar="PATH_OR_ID",
        help=f"what the critic starts from, as --model; {PROBE!r} for a probe critic (default: the policy)",
    )
    add("--gpus", type=int, default=1, help="GPUs of the run (default: %(default)s)")
    add("--gpu_memory", type=float, default=80.0, help="GiB of each (default: %(default)s)")
    add("--sharding", choices=SHARDINGS, help="how several GPUs share the work (default: ddp)")
    add("--prompt", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    add("--completion", type=int, default=8192, help="tokens of a completion (default: %(default)s)")
    add("--batch", type=int, default=1, help="completions of a micro-batch on a GPU (default: %(default)s)")
    add("--accumulation", type=int, default=8, help="micro-batches of an optimizer step (default: %(default)s)")
    add("--generations", type=int, default=8, help="completions of a prompt (default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the policy's weights as they are loaded; all compute in bfloat16 (default: %(default)s, as TRL's)",
    )
    add(
        "--critic_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="the same of the base of a critic with adapters (default: %(default)s)",
    )
    add("--lora_rank", type=int, default=0, help="rank of adapters of policy and critic; 0 for none (default: 0)")
    add("--shared_base", action="store_true", help="the critic is a second adapter on the policy's base")
    add("--no_gradient_checkpointing", action="store_true", help="keep all activations (default: checkpointing)")
    add(
        "--vllm",
        type=float,
        metavar="SHARE",
        help="share of each GPU's memory for a colocated vLLM (default: transformers generates)",
    )
    add("--vllm_sleep", action="store_true", help="vLLM gives its memory back during updates")
    add("--answer", type=int, help="tokens of an answer of GenAC's critic (default: 1024)")
    return parser


def main(argv: list[str]) -> int:
    """Plan and print; returns the exit status: 0 if it fits, 1 if not."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.answer is not None and args.method != "genac":
        parser.error(f"--answer has no effect: {args.method} has no critic that writes")
    from ..planner import Setup, make_plan, read_config, shape_of

    try:
        critic = args.critic
        if critic not in (None, PROBE):
            critic = shape_of(read_config(critic))
        setup = Setup(
            args.method,
            shape_of(read_config(args.model)),
            critic,
            gpus=args.gpus,
            gpu_memory=args.gpu_memory,
            sharding=args.sharding,
            prompt=args.prompt,
            completion=args.completion,
            batch=args.batch,
            accumulation=args.accumulation,
            generations=args.generations,
            dtype=args.dtype,
            critic_dtype=args.critic_dtype,
            lora_rank=args.lora_rank,
            shared_base=args.shared_base,
            checkpointing=not args.no_gradient_checkpointing,
            vllm=args.vllm,
            vllm_sleep=args.vllm_sleep,
            **({} if args.answer is None else {"answer": args.answer}),
        )
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    plan = make_plan(setup)
    _show(plan)
    return 0 if plan.fits else 1


def _show(plan) -> None:
    from ..planner import GIB
    from ..planner.advice import advice
    from ..planner.time_shares import time_shares

    setup = plan.setup
    sizes = f"{setup.policy.parameters / 1e9:.2f} B parameters"
    if setup.has_critic:
        sizes += f", a critic made from {setup.critic_shape.parameters / 1e9:.2f} B"
    print(f"GiB on each GPU: {sizes}\n")
    rows = [["", "", *plan.phases]]
    for part in plan.parts:
        cells = [f"{part.bytes[phase] / GIB:.1f}" if part.bytes.get(phase) else "" for phase in plan.phases]
        if any(cells):
            rows.append([part.owner, part.what, *cells])
    rows.append(["all", "", *(f"{plan.total(phase) / GIB:.1f}" for phase in plan.phases)])
    _print_table(rows)

    seconds = time_shares(setup)
    print("\nTime of a step, estimated from operations and bytes, not measured\n")
    _print_table([[what, "", f"{spent / sum(seconds.values()):.0%}"] for what, spent in seconds.items()])

    peak, room = plan.peak / GIB, setup.gpu_memory
    if plan.fits:
        print(f"\nIt fits: {peak:.1f} of {room:g} GiB.")
        return
    print(f"\nIt does not fit: {peak:.1f} of {room:g} GiB. One change after the other:")
    changes = advice(setup)
    for change in changes:
        print(f"  {change.text}: {change.plan.peak / GIB:.1f} GiB")
    if changes and changes[-1].plan.fits:
        print("Then it fits.")
    else:
        print("Not enough: it takes more or larger GPUs, shorter completions, or a smaller model or critic.")


def _print_table(rows: list[list[str]]) -> None:
    """Words on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(words + numbers).rstrip())
