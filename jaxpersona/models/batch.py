"""A batch: tokens with what is known of each one.

Every question of *where* (an intervention's, a capture's) is a test on `kind` and `turn`, which
travel with the tokens. It therefore means the same in prefill, in chunked prefill and in decode,
and padding is nothing special: it is simply not valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.distributed.sharding import rows_divisor, spread_rows

VALID = 1 << 0  # a token, not padding
FIRST = 1 << 1  # the first of its row: an attention sink with an enormous norm
TEMPLATE = 1 << 2  # scaffold of the chat template, an end-of-turn token included
SYSTEM = 1 << 3  # content of a system message
USER = 1 << 4  # content of a user message
ASSISTANT = 1 << 5  # content of an assistant message
GENERATED = 1 << 6  # sampled by this engine
THINKING = 1 << 7  # inside a thinking block
CODE = 1 << 8  # inside a code block
LAST = 1 << 9  # the last token of the prompt
MARK = 1 << 10  # a mask of the user's own

KINDS = {
    "valid": VALID, "first": FIRST, "template": TEMPLATE, "system": SYSTEM, "user": USER,
    "assistant": ASSISTANT, "generated": GENERATED, "thinking": THINKING, "code": CODE,
    "last": LAST, "mark": MARK,
}


@flax.struct.dataclass
class Batch:
    """Rows of tokens, right-padded.

    Attributes:
      tokens: [B, T] int32.
      position: [B, T] int32, the rotary position; 0 at padding.
      kind: [B, T] uint16, bits of `KINDS`; 0 at padding.
      turn: [B, T] int32, the number of the message that a token belongs to, from 0.
      row_id: [B] uint32, what the row is, for its random draws; never its place in the batch.
      chunk: whether it is a piece of longer prompts (static).
    """

    tokens: Any
    position: Any
    kind: Any
    turn: Any
    row_id: Any
    chunk: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def valid(self) -> jax.Array:
        """[B, T] bool: which entries are tokens."""
        return (self.kind & VALID) != 0

    @property
    def length(self) -> jax.Array:
        """[B] int32: how many tokens each row has."""
        return self.valid.sum(-1, dtype=jnp.int32)

    def spread(self, like: jax.Array) -> Batch:
        """Spread the rows over the mesh of an array, if that lies on one.

        Raises:
          ValueError: the mesh does not divide the rows.
        """
        ways = rows_divisor(like)
        if self.tokens.shape[0] % ways:
            raise ValueError(
                f"the batch has {self.tokens.shape[0]} rows; the mesh spreads rows over {ways} "
                f"devices: give a multiple of {ways}"
            )
        return jax.tree.map(lambda x: spread_rows(x, 0, like), self)


def batch(tokens: Any, *, kind: Any = None, turn: Any = None, row_id: Any = None,
          width: int | None = None, vocabulary: int | None = None) -> Batch:
    """Make a batch of bare tokens.

    Args:
      tokens: [B, T] integers, or a sequence of B sequences of any lengths (padded on the right).
      kind: bits of `KINDS` in the same form (valid, first and last are set here), or None.
      turn: message numbers in the same form, or None for 0.
      row_id: [B] integers, or None for 0, 1, ….
      width: pad to this many tokens; default: the longest row.
      vocabulary: refuse ids that are not below this number, the model's `config.vocab_size`.
        Without it `forward` refuses them when it is called outside `jax.jit`; inside, where values
        are not known, they give NaN.

    Raises:
      ValueError: an empty batch, an empty row, one row in place of several, values that are no
        token ids, `kind` or `turn` of another form, or a row that is longer than `width`.
    """
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise ValueError(f"tokens is {tokens!r:.60}; give rows of token ids")
    rows = [_row(row, i) for i, row in enumerate(tokens)]
    if not rows or any(row.size == 0 for row in rows):
        raise ValueError("tokens has no row or an empty row; every row needs at least one token")
    for i, row in enumerate(rows):
        check_ids(row, vocabulary, f"row {i} of tokens")
    rows = [row.astype(np.int32) for row in rows]
    longest = max(row.size for row in rows)
    width = longest if width is None else width
    if longest > width:
        raise ValueError(f"a row of {longest} tokens does not fit the width {width}")

    def pad(values: Sequence, dtype: Any) -> np.ndarray:
        out = np.zeros((len(rows), width), dtype)
        for i, value in enumerate(values):
            out[i, : len(value)] = value
        return out

    def like(name: str, values: Any) -> list[np.ndarray]:
        if values is None:
            return [np.zeros(row.size, np.int32) for row in rows]
        arrays = [np.array(v, np.int32).reshape(-1) for v in values]
        if [a.size for a in arrays] != [r.size for r in rows]:
            raise ValueError(f"{name} must have one entry for every token")
        return arrays

    kinds = like("kind", kind)
    for bits in kinds:
        bits |= VALID
        bits[0] |= FIRST
        bits[-1] |= LAST
    ids = np.arange(len(rows)) if row_id is None else np.asarray(row_id)
    if ids.shape != (len(rows),):
        raise ValueError(f"row_id has shape {ids.shape}; it must be [{len(rows)}]")
    return Batch(
        tokens=pad(rows, np.int32),
        position=pad([np.arange(row.size) for row in rows], np.int32),
        kind=pad(kinds, np.uint16),
        turn=pad(like("turn", turn), np.int32),
        row_id=ids.astype(np.uint32),
    )


def _row(values: Any, number: int) -> np.ndarray:
    """Return one row of a batch as it was given, [T]."""
    try:
        row = np.asarray(values)
    except ValueError:
        row = np.asarray(None)
    if row.ndim == 0 and np.issubdtype(row.dtype, np.integer):
        raise ValueError("tokens is one row of ids; put it into a list")
    if row.size and not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"row {number} of tokens is {values!r:.60}; give integers")
    return row.reshape(-1)


def check_ids(ids: np.ndarray, vocabulary: int | None, what: str, tokenizer: Any = None) -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
      ids: integers of any shape.
      vocabulary: how many rows the embedding has; None: any id that int32 holds.
      what: what holds the ids, for the message.
      tokenizer: writes the token in the message.

    Raises:
      ValueError: an id below 0 or not below `vocabulary`; it names the first one.
    """
    most = 2**31 if vocabulary is None else vocabulary
    if not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < most):
        return
    flat = ids.reshape(-1)
    wrong = int(flat[(flat < 0) | (flat >= most)][0])
    written = ""
    if tokenizer is not None and 0 <= wrong < len(tokenizer):
        written = f" ({tokenizer.convert_ids_to_tokens(wrong)!r})"
    raise ValueError(
        f"{what} has the token id {wrong}{written}; token ids must lie in 0…{most - 1}"
        + ("" if vocabulary is None else ", the rows of the model's embedding")
        + (": the tokenizer has tokens that the model lacks, so take them out of the text or use "
           "the model's own tokenizer" if written else "")
    )


def split(source: Batch, size: int) -> list[Batch]:
    """Cut a batch along its tokens into chunks of at most `size`, for chunked prefill.

    Raises:
      ValueError: `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it must be positive")
    width = source.tokens.shape[1]
    return [
        Batch(*(x[:, i : i + size] for x in (source.tokens, source.position, source.kind,
                                            source.turn)), row_id=source.row_id, chunk=width > size)
        for i in range(0, width, size)
    ]
