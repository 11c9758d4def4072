"""What benchmarks share: a model of a chosen size, a run in a process of its own, an interval."""

import json
import math
import resource
import statistics
import subprocess
import sys

import torch


# Half-widths of a 95 % interval in standard errors, by Student's t, for 2 to 10 seeds.
T95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=2))


def make_tokenizer():
    """A token for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    return Qwen2Tokenizer(vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_model(tokenizer, hidden: int, layers: int, vocab: int, dtype: torch.dtype = torch.float32):
    """A causal LM with random weights, the same ones every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def peak_memory() -> float:
    """Of this process until now, in MiB: on the GPU, or in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run_in_process(*argv: str) -> dict:
    """What a script writes in its last line, as JSON."""
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over the seeds, and half the width of its 95 % interval."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    return statistics.mean(values), T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
