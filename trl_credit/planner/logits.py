"""Bytes of a language-model head that never holds more logits than a tile: TRL's chunked head."""

from .training import FLOAT32


TILE_TOKENS = 4096  # trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE
TILE_WORDS = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
CRITICS_TILE_WORDS_ON_CPU = 2048  # see trl_credit.seam.lm_head
# Without Triton the gradient of a tile is folded in tensors of its size: seven of four bytes, one of truth values.
FOLDING = 29


def tile_bytes(tokens: int, vocab: int, compute: int, tile_words: int = TILE_WORDS, on_cpu: bool = False) -> float:
    """
    One tile of logits.

    Args:
        tokens (`int`):
            Positions that are scored.
        vocab (`int`):
            Words of the vocabulary. The buffer of a tile has `tile_words` even if there are fewer.
        compute (`int`):
            Bytes of a logit.
        tile_words (`int`, *optional*, defaults to `TILE_WORDS`):
            Words of a tile.
        on_cpu (`bool`, *optional*, defaults to `False`):
            Whether tiles are folded in torch.
    """
    rows = min(tokens, TILE_TOKENS)
    return rows * (compute * tile_words + on_cpu * FOLDING * min(vocab, tile_words))


def head_gradients_bytes(tokens: int, hidden: int, vocab: int, trained: bool) -> float:
    """Gradients of hidden states and of the head's matrix, which are summed up in float32."""
    return FLOAT32 * (tokens * hidden + (vocab * hidden if trained else 0))
