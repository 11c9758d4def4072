"""
Tokens that a generative critic reads and writes to value all states of a completion, with transformers.

    python benchmarks/genac_generation.py --output docs/results/genac_generation.md

Each state's prompt is read in full, or what states share is read once. Tokens are counted where the network takes them
in, padding included, for the shapes of the paper (arXiv:2604.10701): segments of 120 tokens. A random Qwen2 of one
layer writes greedy answers of `--answer` tokens; that both arms write the same ones is checked. Seconds are CPU time of
this process, of a model in which attention is nearly all the work, and say nothing of a GPU.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from measuring import make_model, make_tokenizer

from trl_credit import GenACConfig
from trl_credit.critics.generative.critic import GenerativeCritic
from trl_credit.critics.generative.packed import CriticQuery
from trl_credit.critics.generative.prefixes import StatePrompt


SEGMENT, HEAD, TAIL = 120, 300, 40


def questions(completion: int) -> list[StatePrompt]:
    """Of random tokens about all states of a completion."""
    generator = torch.Generator().manual_seed(0)
    cuts = list(range(HEAD, HEAD + completion, SEGMENT))
    shared, tail = (torch.randint(0, 250, (n,), generator=generator).tolist() for n in (cuts[-1], TAIL))
    query = CriticQuery(shared, cuts, tail)
    return [StatePrompt(query, state) for state in range(len(cuts))]


def measure(model, prompts: list[StatePrompt], answer: int, once: bool) -> dict:
    """Greedy answers, the tokens that were read for them, and CPU seconds."""
    tokenizer, taken = make_tokenizer(), []
    critic = GenerativeCritic(
        model,
        tokenizer,
        tokenizer,
        max_completion_length=answer,
        batch_tokens=GenACConfig.critic_generation_batch_tokens,
        temperature=1e-5,
        reads_prefixes_once=once,
    )
    count = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: taken.append(args[0].numel()))
    started = time.process_time()
    answers = critic.generate(prompts)
    seconds = time.process_time() - started
    count.remove()
    return {"answers": answers, "tokens": sum(taken), "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer", type=int, default=4)
    parser.add_argument("--completions", type=int, nargs="+", default=(480, 1024, 2048, 4096, 8192))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = make_model(make_tokenizer(), 64, 1, vocab=512).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # no ties between tokens
    lines = [
        f"Counted by `python benchmarks/genac_generation.py`: answers of {args.answer} tokens.",
        "",
        "| T | states | each prompt in full | what is shared once | CPU seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for completion in args.completions:
        prompts = questions(completion)
        full, once = (measure(model, prompts, args.answer, reads_once) for reads_once in (False, True))
        assert once["answers"] == full["answers"], "the answers differ"
        shares = " | ".join(f"{found['tokens'] / completion:.2f} T" for found in (full, once))
        seconds = f"{full['seconds']:.1f} and {once['seconds']:.1f}"
        lines.append(f"| {completion} | {len(prompts)} | {shares} | {seconds} |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
