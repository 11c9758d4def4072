"""Segments of a completion: where its text is cut, and the texts between the cuts."""

import itertools
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream


class Segmenter(Protocol):
    """A plain function that divides the tokens of one completion into segments."""

    def __call__(self, token_ids: Sequence[int], tokenizer, trainable: Sequence[bool] | None = None) -> list[int]:
        """
        Args:
            token_ids (`Sequence[int]`):
                Tokens of the completion, T of them, without padding.
            tokenizer:
                The tokenizer that `token_ids` belong to.
            trainable (`Sequence[bool]`, *optional*):
                For each token, whether the policy wrote it; `False` for the output of a tool. `None`: all.

        Returns:
            `list[int]`: The exclusive end of each segment, strictly increasing, the last equal to T; empty if T = 0.
        """


# What ends a segment, the best kind first.
_DELIMITERS = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # a blank line
    re.compile(r"\n"),
    re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*"),  # the end of a sentence
)


@dataclass(frozen=True)
class DelimiterSegmenter:
    """
    Cuts a completion at blank lines, otherwise at line ends, otherwise at sentence ends.

    Between `min_length` and `max_length` from the start of a segment it looks for the best kind of delimiter, and cuts
    at the one closest to `target_length`; the end of a tool's output counts as a blank line. Without a delimiter it
    cuts at `max_length`. A remainder of up to `target_length` is one segment.

    It never cuts inside a character that takes several tokens, nor before or inside a tool's output, which belongs to
    the segment with the call. Only these two rules and `max_segments` can push a length beyond its limits; a completion
    shorter than `min_length` is one segment.

    Args:
        min_length (`int`, *optional*, defaults to `40`):
            Minimum number of tokens in a segment.
        target_length (`int`, *optional*, defaults to `120`):
            Preferred number of tokens in a segment (arXiv:2604.10701 has about 120).
        max_length (`int`, *optional*, defaults to `240`):
            Maximum number of tokens in a segment, at least `2 * min_length`.
        max_segments (`int`, *optional*):
            Maximum number of segments. Where it would be exceeded, the three lengths grow in proportion.

    Raises:
        ValueError: If the lengths are not `0 < min_length <= target_length <= max_length`, `max_length` is below
            `2 * min_length`, or `max_segments` is below 1.

    Example:

    ```python
    >>> DelimiterSegmenter(min_length=2, target_length=4, max_length=8)(ids, tokenizer)
    [5, 9, 14]
    ```
    """

    min_length: int = 40
    target_length: int = 120
    max_length: int = 240
    max_segments: int | None = None

    @classmethod
    def of(cls, config: Any) -> "DelimiterSegmenter":
        """
        The segmenter that a configuration describes.

        Args:
            config:
                With the options `segment_min_length`, `segment_target_length`, `segment_max_length` and `max_segments`.
        """
        try:
            return cls(
                config.segment_min_length, config.segment_target_length, config.segment_max_length, config.max_segments
            )
        except ValueError as error:
            raise ValueError(
                f"{type(config).__name__}: {error} They are `segment_min_length` and so on here."
            ) from None

    def __post_init__(self):
        """Refuse lengths that contradict each other."""
        if not 0 < self.min_length <= self.target_length <= self.max_length:
            raise ValueError(
                "Segment lengths must be 0 < min_length <= target_length <= max_length, got "
                f"{self.min_length}, {self.target_length}, {self.max_length}."
            )
        if self.max_length < 2 * self.min_length:
            raise ValueError(
                f"max_length ({self.max_length}) must be at least twice min_length ({self.min_length}): otherwise some "
                "completions cannot be divided into segments within both."
            )
        if self.max_segments is not None and self.max_segments < 1:
            raise ValueError(f"max_segments must be at least 1 or None, got {self.max_segments}.")

    def __call__(self, token_ids: Sequence[int], tokenizer, trainable: Sequence[bool] | None = None) -> list[int]:
        """See [`Segmenter`]."""
        kinds = self._cuts(list(token_ids), tokenizer, trainable)
        total, start = len(token_ids), 0
        ends: list[int] = []
        while start < total:
            left = total - start
            stretch = 1.0
            if self.max_segments is not None:
                stretch = max(1.0, left / (self.max_segments - len(ends)) / self.target_length)
            shortest, target, longest = (
                round(stretch * length) for length in (self.min_length, self.target_length, self.max_length)
            )
            if left <= max(target, 2 * shortest - 1) or len(ends) + 1 == self.max_segments:
                start = total
            else:
                start += self._length(kinds, start, shortest, target, min(longest, left))
            ends.append(start)
        return ends

    def _length(self, kinds: list[int | None], start: int, shortest: int, target: int, longest: int) -> int:
        """Length of the segment that begins at `start`."""
        left = len(kinds) - start

        def allowed(length: int) -> bool:
            return length == left or (length <= left - shortest and kinds[start + length - 1] is not None)

        delimiters = [
            (kinds[start + length - 1], abs(length - target), length)
            for length in range(shortest, longest + 1)
            if allowed(length) and kinds[start + length - 1] != _NO_DELIMITER
        ]
        if delimiters:
            return min(delimiters)[2]
        for length in [*range(longest, shortest - 1, -1), *range(longest + 1, left)]:
            if allowed(length):
                return length
        return left

    @staticmethod
    def _cuts(token_ids: list[int], tokenizer, trainable: Sequence[bool] | None) -> list[int | None]:
        """For the end of each token the kind of delimiter there, lower is better; `None` where no cut may be."""
        text = _decode(tokenizer, token_ids)
        kind_at = {}
        for kind in reversed(range(len(_DELIMITERS))):
            kind_at.update(dict.fromkeys((match.end() for match in _DELIMITERS[kind].finditer(text)), kind))
        kinds = [
            None if offset is None else kind_at.get(offset, _NO_DELIMITER)
            for offset in _ends_in_text(token_ids, text, tokenizer)
        ]
        for end, (before, after) in enumerate(itertools.pairwise(trainable or ())):
            if not after:
                kinds[end] = None
            elif not before and kinds[end] is not None:
                kinds[end] = 0
        if kinds and kinds[-1] is None:
            kinds[-1] = _NO_DELIMITER
        return kinds


_NO_DELIMITER = len(_DELIMITERS)


def check_ends(ends: Sequence[int], length: int) -> None:
    """Refuse ends that do not divide a completion of this many tokens into segments."""
    starts = [0, *ends[:-1]]
    if any(start >= end for start, end in zip(starts, ends, strict=False)) or [0, *ends][-1] != length:
        raise ValueError(
            "A segmenter must return strictly increasing ends of which the last is the number of tokens "
            f"({length}); got {list(ends)}."
        )


def segment_texts(token_ids: Sequence[int], ends: Sequence[int], tokenizer) -> list[str]:
    """
    Texts of the segments of a completion. Together they are its text, whatever the segments and the tokenizer.

    A character whose tokens are in two segments belongs to the segment that completes it. Special tokens are kept.

    Args:
        token_ids (`Sequence[int]`):
            Tokens of the completion, without padding.
        ends (`Sequence[int]`):
            Exclusive ends of the segments, see [`Segmenter`].
        tokenizer:
            The tokenizer that `token_ids` belong to.

    Returns:
        `list[str]`: One text per segment.

    Raises:
        ValueError: If `ends` do not divide the completion into segments.
    """
    ends, token_ids = list(ends), list(token_ids)
    check_ends(ends, len(token_ids))
    if not ends:
        return []
    text, pieces = _decode(tokenizer, token_ids), token_texts(tokenizer, token_ids)
    if "".join(pieces) == text:
        return ["".join(pieces[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    offsets = [_prefix_length(text, tokenizer, token_ids[:end]) for end in ends[:-1]] + [len(text)]
    return [text[start:end] for start, end in zip([0, *offsets], offsets, strict=False)]


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """
    The text of each token. Joined they are the text of all; the bytes of a character that is spread over several tokens
    are shown with the last of them. A tokenizer that is not fast decodes each token by itself, and the texts need not
    add up.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer that `ids` belong to.
        ids (`list[int]`):
            Tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer.batch_decode([[token] for token in ids])
    stream = DecodeStream(skip_special_tokens=False)
    texts, said = [], 0
    for position, token in enumerate(ids):
        try:
            text = stream.step(tokenizer.backend_tokenizer, token)
        except Exception:  # bytes that are no character: the stream has no other class for it, and is of no use after
            text = _decode(tokenizer, ids[said : position + 1])
            stream = DecodeStream(skip_special_tokens=False)
        texts.append(text or "")
        if text:
            said = position + 1
    if said < len(ids):  # the text ends within a character
        texts[-1] = _decode(tokenizer, ids[said:])
    return texts


def _decode(tokenizer, token_ids: list[int]) -> str:
    """The text of tokens, as they are."""
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _prefix_length(text: str, tokenizer, token_ids: list[int]) -> int:
    """How much of `text` its first tokens settle: a character is not settled before its last token."""
    return len(os.path.commonprefix([text, _decode(tokenizer, token_ids)]))


def _ends_in_text(token_ids: list[int], text: str, tokenizer) -> list[int | None]:
    """
    Where each token ends in `text`, the text of them all; `None` inside a character.

    Where the texts of the tokens do not add up to readable text, most of these are looked up by themselves. The others,
    a part of a character or a word of a tokenizer that drops a leading space, are decoded behind at least four tokens
    before them, for a character has at most four bytes.
    """
    texts = token_texts(tokenizer, token_ids)
    if "\ufffd" not in text and "".join(texts) == text:
        silent = {token for token, own in zip(token_ids, texts, strict=True) if not own}
        parts = {token for token in silent if "\ufffd" in _decode(tokenizer, [token])}
        ends = itertools.accumulate(map(len, texts))
        return [
            None if not own and token in parts else end for token, own, end in zip(token_ids, texts, ends, strict=True)
        ]
    pieces: dict[int, str] = {}
    offsets: list[int | None] = []
    known, offset = 0, 0  # tokens up to `known` end at `offset`
    whole = deque([0])  # ends like `known` before it, as far back as matters
    for end, token in enumerate(token_ids, start=1):
        if token not in pieces:
            pieces[token] = _decode(tokenizer, [token])
        new = pieces[token]
        if known < end - 1 or not new or "\ufffd" in new or not text.startswith(new, offset):
            while len(whole) > 1 and whole[1] <= known - 4:
                whole.popleft()
            context = token_ids[whole[0] : known]
            new = _decode(tokenizer, context + token_ids[known:end])[len(_decode(tokenizer, context)) :]
        if text.startswith(new, offset):
            known, offset = end, offset + len(new)
            offsets.append(offset)
            whole.append(end)
        else:
            offsets.append(None)
            if end - known > 8:  # no character is that long: start again from what is certain
                known, offset = end, _prefix_length(text, tokenizer, token_ids[:end])
    return offsets
