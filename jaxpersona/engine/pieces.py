"""Chunked prefill: each call of the model processes the next piece of up to R texts.

A piece is a chunk of W consecutive tokens of a text; the last piece of a text may be shorter. For a
given cache size, texts of all lengths share one program, and only the last piece of a text contains
padding. When the text in a row ends, another text begins in this row in the next call, while the
texts in the other rows continue. The pieces of a text depend only on its length, so its results are
bit-identical regardless of the other texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.engine.compiled import program
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.kinds import Custom
from jaxpersona.interventions.trace import Applied
from jaxpersona.models.batch import Batch
from jaxpersona.models.cache import init_cache, kept_dtype
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.params import Params

if TYPE_CHECKING:
    from jaxtyping import Bool, Int


# Texts run in pieces only if the model has at least this many parameters, not counting the
# embedding and the head. Each call has a fixed cost: writes to the cache, and attention over all
# cache slots. For a smaller model, this fixed cost exceeds the cost of padding in batches. With 1.5
# million parameters, pieces take about 2 times as long as batches; with 106 million parameters,
# they take 0.85 times as long.
LEAST_PARAMETERS = 10_000_000


class Call(NamedTuple):
    """The pieces that one call of the model processes, at most one in each row.

    Attributes:
      text: [R] int, the index of the text in each row, −1 for an empty row.
      start, stop: [R] int, the range of the piece: tokens start…stop−1 of the text.
      ends: [R] bool, whether the text ends with this piece.
    """

    text: Int[np.ndarray, " R"]
    start: Int[np.ndarray, " R"]
    stop: Int[np.ndarray, " R"]
    ends: Bool[np.ndarray, " R"]

    @property
    def begins(self) -> Bool[np.ndarray, " R"]:
        """[R] bool, whether the text begins with this piece."""
        return (self.text >= 0) & (self.start == 0)


def large(config: ModelConfig) -> bool:
    """Return whether a model is large enough (`LEAST_PARAMETERS`) for pieces to save time."""
    tables = (1 if config.tied_embeddings else 2) * config.vocab_size * config.d_model
    return config.parameters - tables >= LEAST_PARAMETERS


def schedule(lengths: Sequence[int], rows: int, piece: int) -> Iterator[Call]:
    """Yield the sequence of calls that processes all texts.

    The longest texts begin first, so that few rows are empty in the last calls.

    Args:
      lengths: the number of tokens of each text, at least 1.
      rows: the number of rows R.
      piece: W, the number of tokens in a piece.
    """
    queue = sorted(range(len(lengths)), key=lambda i: lengths[i])  # `pop` takes the longest text
    text, start = np.full(rows, -1), np.zeros(rows, int)
    while True:
        for row in np.flatnonzero(text < 0)[: len(queue)]:
            text[row], start[row] = queue.pop(), 0
        if (text < 0).all():
            return
        size = np.array([0 if i < 0 else lengths[i] for i in text])
        stop = np.minimum(start + piece, size)
        ends = (text >= 0) & (stop == size)
        yield Call(text.copy(), start, stop, ends)
        text[ends], start = -1, np.where(ends, 0, stop)


def parts(whole: Sequence[Batch | None], start: Sequence[int] | np.ndarray,
          stop: Sequence[int] | np.ndarray, width: int, size: int) -> Batch:
    """Return a batch with tokens start…stop−1 of each of n single-row batches.

    Args:
      whole: n ≤ `size` single-row batches; None stands for an empty row.
      start, stop: n token indices each.
      width: the number of tokens T per row of the result, at least every stop − start.
      size: the number of rows B of the result; additional rows are empty.
    """
    shape = (size, width)
    tokens, position, turn = (np.zeros(shape, np.int32) for _ in range(3))
    kind = np.zeros(shape, np.uint16)
    row_id = np.zeros(size, np.uint32)
    for b, (one, low, high) in enumerate(zip(whole, start, stop, strict=True)):
        if one is None:
            continue
        for out, values in ((tokens, one.tokens), (position, one.position), (kind, one.kind),
                            (turn, one.turn)):
            out[b, : high - low] = values[0, low:high]
        row_id[b] = one.row_id[0]
    return jax.tree.map(jnp.asarray, Batch(tokens, position, kind, turn, row_id=row_id))


def blank_carry(config: ModelConfig, params: Params, edits: Interventions, capture: Capture, *,
                rows: int, slots: int, layers: int | None = None) -> Carry:
    """Return the carry of B rows before the first token, with every field set.

    Args:
      config, params: the model's configuration and parameters.
      edits: the interventions.
      capture: the activations to capture.
      rows, slots: the cache's number of rows B and number of slots S.
      layers: the number of layers in the cache; None: all layers.
    """
    zeros = jnp.zeros((rows,), jnp.int32)
    cache = init_cache(config, rows, slots, kept_dtype(params.like))
    return Carry(
        cache=cache.replace(k=cache.k[:layers], v=cache.v[:layers]),
        captured=capture.init(config, rows, slots),
        applied=tuple(Applied(zeros, jnp.zeros((len(edit.layers), rows), jnp.int32))
                      for edit in edits.edits),
        gates={str(number): edit.gate.init(rows)
               for number, edit in enumerate(edits.edits) if edit.gate is not None},
        finite=jnp.ones((rows,), bool),
    )


def light(carry: Carry) -> Carry:
    """Return a carry without its keys and values."""
    assert carry.cache is not None
    return carry.replace(cache=carry.cache.replace(k=(), v=()))


def reset(carry: Carry, begins: jax.Array, config: ModelConfig, params: Params,
          edits: Interventions, capture: Capture, axes: tuple[int, ...]) -> Carry:
    """Reset the carry, except for keys and values, in the rows in which a text begins.

    Old keys and values are masked, because the positions of their slots are reset.

    Args:
      carry: the carry of B rows.
      begins: [B] bool, the rows in which a text begins.
      config, params, edits, capture: as for `blank_carry`.
      axes: the batch axis of each leaf of `light(carry)`, −1 for a leaf without one.
    """
    cache = carry.cache
    assert cache is not None
    blank = light(blank_carry(config, params, edits, capture, rows=begins.shape[0],
                              slots=cache.slots))

    def chosen(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        if axis < 0:
            return old
        return jnp.where(begins[(..., *[None] * (old.ndim - axis - 1))], new, old)

    old = light(carry)
    made = jax.tree.map(chosen, old, blank, jax.tree.unflatten(jax.tree.structure(old), axes))
    return made.replace(cache=made.cache.replace(k=cache.k, v=cache.v))


def needs_whole(edits: Interventions) -> bool:
    """Return whether a gate depends on the whole prompt, which must then run in one call."""
    return any(table.gate is not None and table.gate.within for table in edits.edits)


def may_hide_nonfinite(edits: Interventions) -> bool:
    """Return whether an edit may replace non-finite activations with finite ones.

    If so, the keys and values may be non-finite although `Carry.finite` is True.
    """
    return any(isinstance(table, Custom) for table in edits.edits)


@program(donate=("carry",), result=lambda carry, **_: carry)
def zero_keys(carry: Carry, rows: jax.Array) -> Carry:
    """Set the keys and values to zero in the rows where the mask `rows` [B] is True.

    Attention multiplies the values of masked slots by zero, so finite values have no effect, but
    non-finite values become NaN.
    """
    cache = carry.cache
    assert cache is not None
    k, v = jax.tree.map(lambda x: jnp.where(rows[:, None, None, None], 0, x), (cache.k, cache.v))
    return carry.replace(cache=cache.replace(k=k, v=v))
