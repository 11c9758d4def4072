"""Models of given shapes with random weights, and what the scripts of this folder share."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

# Of Qwen2.5: hidden size, layers, heads, key-value heads, width of the feed-forward layer, words.
SHAPES = {"0.5B": (896, 24, 14, 2, 4864, 151936), "1.5B": (1536, 28, 12, 2, 8960, 151936)}
TOY = (64, 2, 2, 1, 128, 512)
LENGTHS = (2048, 8192)
TRAINERS = ("grpo", "vapo", "grpo-lambda", "sppo", "genac")


def qwen(shape: tuple, tokenizer=None, **settings):
    """The config of a Qwen2 of this shape."""
    from transformers import AutoConfig

    hidden, layers, heads, kv_heads, intermediate, vocab = shape
    ends = {} if tokenizer is None else {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model(
        "qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        **ends,
        **settings,
    )


def random_model(config, device: str, dtype: torch.dtype = torch.float32):
    """The same weights every time, made where they will be."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def device_of(toy: bool) -> str:
    """The GPU, or with toy sizes the CPU."""
    return "cpu" if toy else "cuda"


def timed(function, device: str, runs: int) -> tuple[float, float]:
    """Median seconds of `runs` calls after one that warms up, and GiB that one takes at most, 0 on a CPU."""
    function()
    times = []
    held = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    for _ in range(runs):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if device == "cuda" else 0.0
    return sorted(times)[len(times) // 2], peak


def arguments(description: str, *names: str) -> argparse.Namespace:
    """Positional `names`, and what every script is told by `run.py`."""
    parser = argparse.ArgumentParser(description=description)
    for name in names:
        parser.add_argument(name)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds", type=int, default=1500, help="time left to the whole run")
    return parser.parse_args()


def report(result: dict) -> None:
    """As the last line, where `run.py` reads it."""
    print(json.dumps(result))
