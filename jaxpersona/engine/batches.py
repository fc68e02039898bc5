"""Batches of complete conversations or prompts for forward passes without a cache.

Conversations of the same padded length form batches, and all batches have about the same number of
tokens. The padded length depends only on a conversation's length, and the number of rows only on
the padded length and the arguments `tokens` and `ways` of `batches`. A conversation's results are
therefore bit-identical regardless of the other conversations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.models.batch import Batch
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.text import chat


def width_of(tokens: int) -> int:
    """Return the padded length of a conversation of `tokens` tokens.

    The padded length is `tokens` rounded up to a multiple of max(32, p / 8), where p is the largest
    power of two below `tokens`.
    """
    step = max(32, (1 << (tokens - 1).bit_length()) // 16)
    return -(-tokens // step) * step


def batches(rows: list[chat.Row], tokens: int,
             ways: int) -> list[tuple[list[int], int, int]]:
    """Group conversations of the same padded length into batches.

    Args:
      rows: the encoded conversations.
      tokens: the target number of tokens in a batch, including padding.
      ways: the number of shards of the batch axis; the number of rows in a batch is a multiple of
        it.

    Returns:
      One tuple per batch, in descending order of the padded length: the indices of the batch's
      conversations, the padded length and the number of rows.
    """
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(width_of(row.tokens.size), []).append(i)
    out = []
    for width, members in sorted(groups.items(), reverse=True):
        size = max(1, tokens // (width * ways)) * ways  # divisible by `ways` for sharding
        out += [(members[at : at + size], width, size) for at in range(0, len(members), size)]
    return out


def pad(rows: list[chat.Row], width: int, size: int) -> Batch:
    """Return a batch of `size` rows of `width` tokens; rows without a conversation are padding."""
    real = make_batch([r.tokens for r in rows], kind=[r.kind for r in rows],
                      turn=[r.turn for r in rows], width=width)
    extra = size - len(rows)
    return jax.tree.map(
        lambda x: jnp.asarray(np.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))), real)
