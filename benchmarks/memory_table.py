"""
GiB that four trainers take at the sizes of Qwen2.5, by the planner: nothing is loaded or downloaded.

    python benchmarks/memory_table.py --output docs/results/memory.md
"""

import argparse
from pathlib import Path

from trl_credit.planner import GIB, Setup, make_plan, shape_of
from trl_credit.planner.memory import ANSWERS, GENERATION
from trl_credit.planner.setup import METHODS_WITH_CRITIC, TOKEN_CRITICS


# Hidden size, layers, heads, key-value heads, width of the feed-forward layer, words, whether the head is tied.
QWEN = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}
TRAINERS = ("grpo-lambda", "vapo", "sppo", "genac")
ROOM = 80


def qwen_shape(name: str):
    """The shape of a Qwen2.5."""
    from transformers import AutoConfig

    hidden, layers, heads, kv_heads, intermediate, vocab, tied = QWEN[name]
    return shape_of(
        AutoConfig.for_model(
            "qwen2",
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
        )
    )


def settings(trainer: str, gpus: int, how: str) -> dict:
    """Options of a plan: full weights are sharded by ZeRO-3, adapters are on a whole base in bfloat16."""
    if how == "full":
        return {"sharding": "zero3" if gpus > 1 else None}
    shared = how == "shared base"
    has_base = trainer in METHODS_WITH_CRITIC and not shared
    own = {"critic_dtype": "bfloat16"} if has_base else {}
    return {"lora_rank": 32, "dtype": "bfloat16", "shared_base": shared, **own}


def cell(trainer: str, shape, gpus: int, how: str) -> str:
    """GiB of the updates, and of generation, bold where there are more than a GPU has."""
    if how == "shared base" and trainer not in (*TOKEN_CRITICS, "sppo"):
        return ""
    setup = Setup(trainer, shape, gpus=gpus, gpu_memory=ROOM, vllm=0.3, vllm_sleep=True, **settings(trainer, gpus, how))
    plan = make_plan(setup)
    generates = [phase for phase in plan.phases if phase in (GENERATION, ANSWERS)]
    updates = [phase for phase in plan.phases if phase not in generates]
    numbers = [max(map(plan.total, phases)) for phases in (updates, generates)]
    shown = " / ".join(f"{number / GIB:.0f}" for number in numbers)
    return shown if plan.fits else f"**{shown}**"


def table() -> str:
    """Markdown."""
    lines = [
        "Planned by `python benchmarks/memory_table.py`: GiB on each GPU in the updates / in generation.",
        "",
        "| model | GPUs | weights | " + " | ".join(f"`{trainer}`" for trainer in TRAINERS) + " |",
        "| --- | --- | --- |" + " --- |" * len(TRAINERS),
    ]
    for name in QWEN:
        shape = qwen_shape(name)
        for gpus in (1, 8):
            for how in ("full", "LoRA", "shared base"):
                cells = [cell(trainer, shape, gpus, how) for trainer in TRAINERS]
                lines.append(f"| {name} | {gpus} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = table()
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
