"""Texts of segments: in linear time, and the same in every stage whatever the tokenizer does with spaces."""

import random
import time

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from trl_credit.critics.generative.question import TEMPLATE, critic_query, render
from trl_credit.segmenting import DelimiterSegmenter, segment_texts, token_texts


def spacing_tokenizer():
    """As Llama 2's: a space before every text, dropped again where a text begins; bytes as a last resort."""
    symbols = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:;<>/_()▁\n"]
    symbols += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {symbol: i for i, symbol in enumerate(["<unk>", "<s>", "</s>", *symbols, "▁a", "▁s", "▁so"])}
    model = models.BPE(vocab, [("▁", "a"), ("▁", "s"), ("▁s", "o")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", split_special_tokens=False
    )


TOKENIZERS = {"of bytes": tiny_tokenizer, "with spaces": spacing_tokenizer}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_texts_of_32k_tokens_take_no_time(name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(0)
    ids = tokenizer("".join(rng.choice("ab so\n.é") for _ in range(32_000)))["input_ids"][:32_000]
    ends = [*range(120, 32_000, 120), len(ids)]
    seconds = []
    for _ in range(3):
        started = time.process_time()
        texts = segment_texts(ids, ends, tokenizer)
        seconds.append(time.process_time() - started)
    assert "".join(texts) == tokenizer.decode(ids)
    assert min(seconds) < 0.2, "a decoding for each prefix takes ten times as long"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.slow
def test_cutting_32k_tokens_takes_a_few_times_as_long_as_reading_their_text(name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(0)
    ids = tokenizer("".join(rng.choice("ab so\n.é") for _ in range(32_000)))["input_ids"][:32_000]
    seconds = {token_texts: [], DelimiterSegmenter(): []}
    for _ in range(5):
        for function, taken in seconds.items():
            started = time.process_time()
            function(*((tokenizer, ids) if function is token_texts else (ids, tokenizer)))
            taken.append(time.process_time() - started)
    reading, cutting = (min(taken) for taken in seconds.values())
    assert cutting < 2.5 * reading, "looking each token up by itself takes three times as long as reading them all"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_division_gives_the_whole_text(name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(1)
    for _ in range(50):
        ids = tokenizer("".join(rng.choice(" abc\n.é😀") for _ in range(rng.randint(1, 40))))["input_ids"]
        ends = sorted({*rng.sample(range(1, len(ids) + 1), rng.randint(0, len(ids) - 1)), len(ids)})
        assert "".join(segment_texts(ids, ends, tokenizer)) == tokenizer.decode(ids)
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_critic_reads_in_pieces_what_the_oracle_was_asked_at_one_go(name):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = None
    segments = ["So a,\n", "so it is.", " And so\n\n", "x"]
    slots = {"actor": "A model", "success_rate": "0.25", "problem": "so 1?"}
    query = critic_query(tokenizer, TEMPLATE, slots["problem"], segments, slots["actor"], 0.25)
    for k, ids in enumerate(query.prompts()):
        asked = render(TEMPLATE, **slots, partial_solution="".join(segments[:k]))
        assert tokenizer.decode(ids, skip_special_tokens=True) == asked


def test_bytes_that_are_no_character_have_texts_too():
    tokenizer = spacing_tokenizer()
    for seed in range(20):
        rng = random.Random(seed)
        ids = [rng.randrange(3, len(tokenizer)) for _ in range(60)]
        assert len(token_texts(tokenizer, ids)) == 60
        assert "".join(segment_texts(ids, [7, 20, 60], tokenizer)) == tokenizer.decode(ids)
