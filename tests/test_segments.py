import random

import pytest
import torch
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from trl_credit.credit.running_mean import RunningMean
from trl_credit.credit.segment_gae import segment_advantages, segment_of_token
from trl_credit.segmenting import DelimiterSegmenter, _ends_in_text, segment_texts


def merged_tokenizer():
    """Byte-level with merges: tokens that end in one, two or three delimiters, and one that splits a character."""
    alphabet = sorted(ByteLevel.alphabet())
    encode = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    newline, space, dot = (encode(c)[0][0] for c in "\n .")
    emoji = encode("😀")[0][0]
    merges = [(newline, newline), (dot, newline), (space, "t"), (emoji[0], emoji[1])]
    vocab = {symbol: i for i, symbol in enumerate(alphabet + ["".join(pair) for pair in merges])}
    return Qwen2Tokenizer(vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def metaspace_tokenizer():
    """In the manner of Llama 2: words begin with a mark, the first loses its space, unknown characters are bytes."""
    words = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], "▁", "a", "b", "c", "▁a", ".", "\n", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    model = BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


TOKENIZERS = {"bytes": tiny_tokenizer(), "merged": merged_tokenizer(), "metaspace": metaspace_tokenizer()}
PIECES = [
    "a",
    " ab",
    " tab",
    "b",
    "c",
    ".",
    ". ",
    "!\n",
    "\n",
    "\n\n",
    "\n \n",
    "3.14",
    "é",
    "漢字。",
    "😀",
    "👩‍👩‍👧",
    "�",
    "\x00",
    "е́",
]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def random_case(seed):
    """A tokenizer, tokens (text, or anything at all), tool turns, and a segmenter."""
    rng = random.Random(seed)
    tokenizer = TOKENIZERS[rng.choice(list(TOKENIZERS))]
    ids = tokenizer("".join(rng.choices(PIECES, k=rng.randrange(1, 150))), add_special_tokens=False)["input_ids"]
    if rng.random() < 0.3:
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 200))]
    trainable = None
    if rng.random() < 0.5:
        trainable = [True] * len(ids)
        for _ in range(rng.randrange(3)):
            start = rng.randrange(len(ids))
            for i in range(start, min(len(ids), start + rng.randrange(1, 40))):
                trainable[i] = False
    shortest = rng.randrange(1, 20)
    longest = rng.randrange(2 * shortest, 6 * shortest + 2)
    target = rng.randrange(shortest, longest + 1)
    segmenter = DelimiterSegmenter(shortest, target, longest, rng.choice([None, None, 1, 2, 5]))
    return tokenizer, ids, trainable, segmenter


def ends_of(text, segmenter, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    return segmenter(ids, tokenizer), ids


@pytest.mark.parametrize("block", range(6))
def test_any_completion_is_divided_into_segments_within_the_limits(block):
    for seed in range(50 * block, 50 * block + 50):
        tokenizer, ids, trainable, segmenter = random_case(seed)
        ends = segmenter(ids, tokenizer, trainable)
        assert ends == sorted(set(ends)) and ends[-1] == len(ids) and ends[0] > 0
        texts = segment_texts(ids, ends, tokenizer)
        assert "".join(texts) == decode(tokenizer, ids)
        if segmenter.max_segments is not None:
            assert len(ends) <= segmenter.max_segments
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if len(ends) > 1:
            assert min(lengths) >= 1
        if trainable is not None:
            assert all(trainable[end] for end in ends[:-1])  # not before or inside what a tool returned
        cuttable = [
            end
            for end, offset in enumerate(_ends_in_text(ids, decode(tokenizer, ids), tokenizer), 1)
            if end == len(ids) or (offset is not None and (trainable is None or trainable[end]))
        ]
        assert set(ends) <= set(cuttable)
        if segmenter.max_segments is None and len(cuttable) == len(ids):
            assert max(lengths) <= segmenter.max_length
            assert len(ids) < segmenter.min_length or min(lengths) >= segmenter.min_length


@pytest.mark.parametrize("block", range(3))
def test_a_cut_leaves_every_character_whole(block):
    """At every cut both sides decode by themselves to their share of the text: no byte of one is in the other."""
    for seed in range(60 * block, 60 * block + 60):
        rng = random.Random(seed)
        tokenizer = TOKENIZERS[rng.choice(["bytes", "merged"])]
        text = "".join(rng.choices([piece for piece in PIECES if piece != "�"], k=rng.randrange(1, 80)))
        ids = tokenizer(text)["input_ids"]
        ends = DelimiterSegmenter(1, 2, 3)(ids, tokenizer)
        pieces = [decode(tokenizer, ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        assert "".join(pieces) == text and "�" not in "".join(pieces)


def test_a_token_ends_in_the_text_where_the_text_of_the_tokens_up_to_it_ends():
    """Against decoding every prefix."""
    for seed in range(80):
        tokenizer, ids, _, _ = random_case(seed)
        text = decode(tokenizer, ids)
        if tokenizer is TOKENIZERS["metaspace"] and "�" in text:
            continue  # one byte that is no character makes the whole run of bytes around it unreadable there
        for end, offset in enumerate(_ends_in_text(ids, text, tokenizer), 1):
            prefix = decode(tokenizer, ids[:end])
            assert offset == (len(prefix) if text.startswith(prefix) else None), (seed, end)


def test_a_blank_line_comes_before_a_line_end_and_that_before_the_end_of_a_sentence():
    segmenter = DelimiterSegmenter(min_length=5, target_length=10, max_length=20)
    for text, first in {
        "aaaaaa\n\naa. aaa\naaaaaaaaaaaaaaaaaaaaaa": 8,
        "aaaaaa. aa aa\naaaaaaaaaaaaaaaaaaaaaaaaa": 14,
        "aaaaaa. aa aaaaaaaaaaaaaaaaaaaaaaaaaaaaa": 7,
        "aaa 3.14 aaa aaaaaaaaaaaaaaaaaaaaaaaaaaa": 20,
        'aa "aaaaa." aa aaaaaaaaaaaaaaaaaaaaaaaaaa': 11,
    }.items():
        assert ends_of(text, segmenter)[0][0] == first, text


def test_of_two_delimiters_of_a_kind_the_one_nearest_the_target_is_taken():
    segmenter = DelimiterSegmenter(min_length=5, target_length=12, max_length=24)
    ends, _ = ends_of("aaaaaa\naaaa\naaaaaaaaa\naaaaaaaaaaaaaaaaaaaa", segmenter)
    assert ends[0] == 12


def test_no_delimiter_in_4096_tokens_is_cut_at_the_greatest_length():
    ends, _ = ends_of("a" * 4096, DelimiterSegmenter(40, 120, 240))
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert lengths == [240] * 16 + [216, 40]


def test_characters_of_four_tokens_are_not_cut():
    ends, ids = ends_of("😀" * 100, DelimiterSegmenter(5, 10, 15))
    assert len(ids) == 400 and all(end % 4 == 0 for end in ends)


def test_empty_completion_has_no_segment_and_one_token_has_one():
    tokenizer = tiny_tokenizer()
    assert DelimiterSegmenter()([], tokenizer) == []
    assert segment_texts([], [], tokenizer) == []
    assert DelimiterSegmenter()([5], tokenizer) == [1]
    assert DelimiterSegmenter()([5], tokenizer, [False]) == [1]


def test_what_a_tool_returned_is_one_piece_with_the_call_and_the_next_segment_begins_behind_it():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("x" * 9 + "\ncall" + "\n\ntool. says\n\n" * 4 + "y" * 50)["input_ids"]
    trainable = [True] * 14 + [False] * 56 + [True] * 50
    assert DelimiterSegmenter(5, 12, 20)(ids, tokenizer, trainable)[:2] == [10, 70]


def test_max_segments_makes_segments_longer_and_keeps_delimiters():
    text = "word word word.\n" * 40
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(DelimiterSegmenter(8, 16, 32)(ids, tokenizer)) == 40
    ends = DelimiterSegmenter(8, 16, 32, max_segments=4)(ids, tokenizer)
    assert ends == [160, 320, 480, 640]
    assert DelimiterSegmenter(8, 16, 32, max_segments=1)(ids, tokenizer) == [640]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"min_length": 0}, "min_length"),
        ({"target_length": 300}, "120|300"),
        ({"min_length": 100, "max_length": 150}, "twice"),
        ({"max_segments": 0}, "max_segments"),
    ],
)
def test_lengths_that_contradict_each_other_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        DelimiterSegmenter(**fields)


@pytest.mark.parametrize("ends", [[], [2], [1, 1, 3], [4], [0, 3], [2, 1, 3]])
def test_a_segmenter_that_loses_tokens_is_found_out(ends):
    with pytest.raises(ValueError, match="strictly increasing"):
        segment_texts([1, 2, 3], ends, tiny_tokenizer())


def test_any_division_gives_the_whole_text_even_inside_characters():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a😀é")["input_ids"]
    assert segment_texts(ids, list(range(1, len(ids) + 1)), tokenizer) == ["a", "", "", "", "😀", "", "é"]


def test_segment_of_token_leaves_out_padding_and_tool_output():
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    expected = torch.tensor([[0, 0, -1, 1, 2], [0, -1, -1, -1, -1], [-1] * 5])
    assert torch.equal(segment_of_token([[2, 4, 5], [1], []], mask), expected)


def textbook_advantages(reward, values, lam):
    advantage, after, out = 0.0, 0.0, []
    for k in reversed(range(len(values))):
        advantage = (reward if k == len(values) - 1 else 0.0) + after - values[k] + lam * advantage
        after = values[k]
        out.append(advantage)
    return out[::-1]


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.3, 0.0])
def test_segment_advantages_are_gae_over_segments_broadcast(lam):
    rng = random.Random(0)
    ends = [[3, 5, 9], [9], [2, 4, 6, 8], []]
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[0, 4:] = torch.tensor([0, 1, 1, 0, 1])
    mask[2, 2:4] = False  # the second segment has no trained token: not a time step
    mask[2, 8:] = False
    mask[3] = False
    values = torch.tensor([[rng.random() for _ in range(4)] for _ in ends], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.7, 1.0], dtype=torch.float64)
    segments = segment_of_token(ends, mask)
    actual = segment_advantages(rewards, values, segments, lam)
    expected = torch.zeros(4, 9, dtype=torch.float64)
    for i in range(4):
        steps = sorted(set(segments[i].tolist()) - {-1})
        by_step = textbook_advantages(rewards[i].item(), [values[i, k].item() for k in steps], lam)
        for t in range(9):
            if segments[i, t] >= 0:
                expected[i, t] = by_step[steps.index(segments[i, t].item())]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if lam == 1:
        exact = rewards.unsqueeze(1) - values.gather(1, segments.clamp(min=0))
        assert torch.equal(actual[mask], exact[mask])


def test_values_that_are_no_segments_are_not_read():
    values = torch.tensor([[0.5, float("nan"), 0.25]])
    segments = torch.tensor([[0, 0, 2]])
    assert torch.equal(segment_advantages(torch.ones(1), values, segments), torch.tensor([[0.5, 0.5, 0.75]]))


def test_a_token_beyond_the_values_is_refused():
    with pytest.raises(ValueError, match="segment 2.*has 2"):
        segment_advantages(torch.ones(1), torch.ones(1, 2), torch.tensor([[0, 2]]))


def test_the_running_mean_starts_at_zero_and_is_corrected_for_it():
    state = RunningMean()
    assert state.value == 0
    state = state.updated(torch.tensor([0.0, 1.0, float("nan")]))
    assert state.total == pytest.approx(0.05) and state.value == pytest.approx(0.5)
    state = state.updated(torch.tensor([1.0]))
    assert state.total == pytest.approx(0.9 * 0.05 + 0.1) and state.value == pytest.approx(0.145 / 0.19)
    assert state.updated(torch.tensor([float("nan")])) == state
    assert state.updated(torch.tensor([])) == state


def test_the_running_mean_is_the_weighted_mean_of_all_steps():
    rng = random.Random(1)
    means, state = [], RunningMean()
    for _ in range(30):
        rewards = torch.tensor([rng.random() for _ in range(5)], dtype=torch.float64)
        means.append(rewards.mean().item())
        state = state.updated(rewards, momentum=0.8)
    weights = [0.2 * 0.8**age for age in range(29, -1, -1)]
    expected = sum(weight * mean for weight, mean in zip(weights, means, strict=True)) / sum(weights)
    assert state.value == pytest.approx(expected, rel=1e-12)
