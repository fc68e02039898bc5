"""Batches: token ids with per-token metadata.

`kind` and `turn` are stored for each token. Interventions and captures select tokens by these two
fields, so a selection has the same meaning in prefill, chunked prefill and decode. Padding does not
have the `VALID` bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import brief
from jaxpersona.distributed.sharding import rows_divisor, spread_rows
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, UInt16, UInt32

VALID = 1 << 0  # a token that is not padding
FIRST = 1 << 1  # the first token of a row, an attention sink with a very large norm
TEMPLATE = 1 << 2  # added by the chat template, including end-of-turn tokens
SYSTEM = 1 << 3  # content of a system message
USER = 1 << 4  # content of a user message
ASSISTANT = 1 << 5  # content of an assistant message
GENERATED = 1 << 6  # sampled from the model, not part of the prompt
THINKING = 1 << 7  # inside a thinking block
CODE = 1 << 8  # inside a code block
LAST = 1 << 9  # the last token of the prompt
MARK = 1 << 10  # selected by a user-defined mask

KINDS = {
    "valid": VALID, "first": FIRST, "template": TEMPLATE, "system": SYSTEM, "user": USER,
    "assistant": ASSISTANT, "generated": GENERATED, "thinking": THINKING, "code": CODE,
    "last": LAST, "mark": MARK,
}


class Batch(flax.struct.PyTreeNode):
    """A right-padded batch of token rows.

    Attributes:
      tokens: [B, T] int32.
      position: [B, T] int32, the rotary position; 0 at padding.
      kind: [B, T] uint16, a bit mask of `KINDS`; 0 at padding.
      turn: [B, T] int32, the index of the token's message, from 0.
      row_id: [B] uint32, an ID that seeds the row's random draws; the row's index in the batch has
        no effect on them.
      chunk: whether the batch is one chunk of a longer prompt (static).

    Examples:
      >>> import jaxpersona as jp
      >>> jp.batch([[5, 6, 7], [8]]).position.tolist()
      [[0, 1, 2], [0, 0, 0]]
    """

    __repr__ = brief

    tokens: Int32[Array | np.ndarray, "B T"]
    position: Any  # the type of `tokens`; Any because some functions annotate it as jax.Array
    kind: UInt16[Array | np.ndarray, "B T"]
    turn: Int32[Array | np.ndarray, "B T"]
    row_id: UInt32[Array | np.ndarray, " B"]
    chunk: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def valid(self) -> jax.Array:
        """[B, T] bool: True at tokens, False at padding."""
        return (self.kind & VALID) != 0

    @property
    def length(self) -> jax.Array:
        """[B] int32: the number of tokens in each row."""
        return self.valid.sum(-1, dtype=jnp.int32)

    def spread(self, like: jax.Array) -> Batch:
        """Shard the rows over the mesh of `like`; without a mesh, return the batch unchanged.

        Raises:
          UserError: the number of rows is not a multiple of the mesh's data-parallel size.
        """
        ways = rows_divisor(like)
        if self.tokens.shape[0] % ways:
            raise UserError(
                f"the batch has {self.tokens.shape[0]} rows; the mesh shards rows over {ways} "
                f"devices, so use a multiple of {ways}"
            )
        return jax.tree.map(lambda x: spread_rows(x, 0, like), self)


def batch(tokens: Any, *, kind: Any = None, turn: Any = None, row_id: Any = None,
          width: int | None = None, vocabulary: int | None = None) -> Batch:
    """Build a batch from token ids.

    Args:
      tokens: [B, T] integers, or B sequences of any length (right-padded here).
      kind: bit masks of `KINDS`, nested like `tokens`, or None. VALID, FIRST and LAST are set
        automatically.
      turn: message indices, nested like `tokens`, or None for all zeros.
      row_id: [B] integers, or None for 0, 1, ….
      width: the number of tokens to pad each row to; default: the length of the longest row.
      vocabulary: the model's `config.vocab_size`; an id that is not less raises an error. If None,
        `forward` checks the ids when it runs outside `jax.jit`. Under `jax.jit`, where values are
        unknown, an invalid id results in NaN.

    Raises:
      UserError: the batch or a row is empty, a single row is not in a list, values are not token
        ids, `kind` or `turn` does not match the shape of `tokens`, or a row is longer than `width`.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.batch([[5, 6, 7], [8]], vocabulary=1024).tokens.shape
      (2, 3)
    """
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise UserError(f"tokens is {tokens!r:.60}; give a list of rows of token ids")
    rows = [_row(row, i) for i, row in enumerate(tokens)]
    if not rows or any(row.size == 0 for row in rows):
        raise UserError("tokens is empty or has an empty row; every row needs at least one token")
    for i, row in enumerate(rows):
        check_ids(row, vocabulary, f"row {i} of tokens")
    rows = [row.astype(np.int32) for row in rows]
    longest = max(row.size for row in rows)
    width = longest if width is None else width
    if not isinstance(width, (int, np.integer)):
        raise UserError(f"width is {width!r:.60}; it must be an integer")
    if longest > width:
        raise UserError(f"width is {width}, but a row has {longest} tokens; give a larger width")

    def pad(values: Sequence, dtype: Any) -> np.ndarray:
        out = np.zeros((len(rows), width), dtype)
        for i, value in enumerate(values):
            out[i, : len(value)] = value
        return out

    def like(name: str, values: Any) -> list[np.ndarray]:
        if values is None:
            return [np.zeros(row.size, np.int32) for row in rows]
        try:
            arrays = [np.array(v, np.int32).reshape(-1) for v in values]
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{name} is {values!r:.60}; give one 32-bit integer per token of every "
                            "row") from error
        if [a.size for a in arrays] != [r.size for r in rows]:
            raise UserError(f"{name} must have one entry per token of every row")
        return arrays

    kinds = like("kind", kind)
    for bits in kinds:
        bits |= VALID
        bits[0] |= FIRST
        bits[-1] |= LAST
    ids = np.arange(len(rows)) if row_id is None else np.asarray(row_id)
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"row_id is {row_id!r:.60}; give one integer per row")
    if ids.shape != (len(rows),):
        raise UserError(f"row_id has shape {ids.shape}; it must be [{len(rows)}]")
    return Batch(
        tokens=pad(rows, np.int32),
        position=pad([np.arange(row.size) for row in rows], np.int32),
        kind=pad(kinds, np.uint16),
        turn=pad(like("turn", turn), np.int32),
        row_id=ids.astype(np.uint32),
    )


def _row(values: Any, number: int) -> np.ndarray:
    """Return one row of a batch as an integer array [T]."""
    try:
        row = np.asarray(values)
    except ValueError:
        row = np.asarray(None)
    if row.ndim == 0 and np.issubdtype(row.dtype, np.integer):
        raise UserError("tokens is a single row of ids; give a list of rows")
    if row.size and not np.issubdtype(row.dtype, np.integer):
        raise UserError(f"row {number} of tokens is {values!r:.60}; give integers")
    return row.reshape(-1)


def check_ids(ids: np.ndarray, vocabulary: int | None, what: str, tokenizer: Any = None) -> None:
    """Check that token ids are valid indices of the model's embedding.

    Args:
      ids: integers of any shape.
      vocabulary: the number of rows of the embedding; None allows any nonnegative int32.
      what: the source of the ids, for the error message.
      tokenizer: a tokenizer that adds the text of the token to the error message, or None.

    Raises:
      UserError: an id is negative or not less than `vocabulary`; the message shows the first such
        id.
    """
    most = 2**31 if vocabulary is None else vocabulary
    if not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < most):
        return
    flat = ids.reshape(-1)
    wrong = int(flat[(flat < 0) | (flat >= most)][0])
    written = ""
    if tokenizer is not None and 0 <= wrong < len(tokenizer):
        written = f" ({tokenizer.convert_ids_to_tokens(wrong)!r})"
    raise UserError(
        f"{what} has the token id {wrong}{written}; token ids must be in 0…{most - 1}"
        + ("" if vocabulary is None else ", the rows of the model's embedding")
        + (": the tokenizer has tokens that the model does not have, so remove them from the text "
           "or use the model's own tokenizer" if written else "")
    )


def split(source: Batch, size: int) -> list[Batch]:
    """Split a batch along T into chunks of at most `size` tokens, for chunked prefill.

    Raises:
      UserError: `size` is not positive.
    """
    if size < 1:
        raise UserError(f"size is {size}; it must be positive")
    width = source.tokens.shape[1]
    return [
        Batch(*(x[:, i : i + size] for x in (source.tokens, source.position, source.kind,
                                            source.turn)), row_id=source.row_id, chunk=width > size)
        for i in range(0, width, size)
    ]
