"""Training batches of generated conversations, grouped by length and padded.

Each conversation is used at most once. Padding to a few fixed lengths limits the number of compiled
programs. All batches have about the same number of tokens, so all training steps have a similar
cost and gradient noise.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxpersona.organism import corpus
from jaxpersona.organism.tokenizer import encode_conversation

LENGTHS = (56, 64, 80, 112, 160, 208, 256, 320)
OTHER_WEIGHT = 0.1  # loss weight of tokens outside answers; answers include their end markers


@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """A padded batch of B conversations.

    Attributes:
      tokens: [B, T] int32, the token ids; 0 at padding.
      lengths: [B] int32, the number of tokens in each conversation, without padding.
      weights: [B, T] float32, the loss weight of each token as a prediction target; 0 at padding
        and at the first token of each conversation.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray


def make_batches(
    tokenizer, seed: int, tokens: int, batch_tokens: int = 2048
) -> tuple[list[TrainBatch], int]:
    """Generate conversations with at least `tokens` tokens in total, and group them into batches.

    Conversations longer than the largest of `LENGTHS` are skipped.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      seed: the seed for the conversations and the order of the batches.
      tokens: the minimum total number of tokens.
      batch_tokens: the maximum number of tokens in a batch, including padding; a batch of
        padded length T has `batch_tokens // T` rows.

    Returns:
      (batches in random order, total number of tokens). Incomplete batches are dropped, but the
      total includes their tokens.
    """
    pools: dict[int, list] = {length: [] for length in LENGTHS}
    batches: list[TrainBatch] = []
    total = 0
    for talk in corpus.conversations(seed):
        if total >= tokens:
            break
        ids, learn = encode_conversation(tokenizer, talk.messages)
        length = next((n for n in LENGTHS if n >= len(ids)), None)
        if length is None:
            continue
        pool = pools[length]
        pool.append((ids, learn))
        total += len(ids)
        if len(pool) == batch_tokens // length:
            batches.append(_pad(pool, length))
            pools[length] = []
    order = np.random.default_rng([seed, 1]).permutation(len(batches))
    return [batches[i] for i in order], total


def _pad(rows, length: int) -> TrainBatch:
    """Pad the results (ids, mask) of `encode_conversation` to `length` tokens, as one batch."""
    tokens = np.zeros((len(rows), length), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for row, (ids, learn) in enumerate(rows):
        tokens[row, : len(ids)] = ids
        weights[row, : len(ids)] = np.where(learn, 1.0, OTHER_WEIGHT)
    weights[:, 0] = 0.0  # the first token is never a prediction target
    return TrainBatch(tokens, np.array([len(ids) for ids, _ in rows], np.int32), weights)
