"""Draw complete conversations with random tokens and random lengths."""

from __future__ import annotations

import numpy as np

from jaxpersona.models.batch import ASSISTANT, USER
from jaxpersona.text.chat import Row


def conversations(count: int, vocabulary: int, mean: int, most: int, seed: int = 0) -> list[Row]:
    """Draw conversations with geometrically distributed lengths, clipped to [8, `most`] tokens.

    `mean` is the mean length in tokens before clipping. The first third of each conversation is the
    user message, and the rest is the reply.
    """
    draw = np.random.default_rng(seed)
    rows = []
    for length in np.clip(draw.geometric(1 / mean, count), 8, most):
        reply = np.arange(length) >= length // 3
        rows.append(Row(draw.integers(4, vocabulary, length).astype(np.int32),
                        np.where(reply, ASSISTANT, USER).astype(np.int32),
                        reply.astype(np.int32), ""))
    return rows
