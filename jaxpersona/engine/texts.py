"""Forward passes over complete texts of different lengths, in pieces (chunked prefill) on a CPU.

A piece is a chunk of `PIECE` consecutive tokens of a text; the last piece of a text may be shorter.
The number of cache slots is the text's length rounded up to a power of two, at least 256, or to a
multiple of 64 if that power exceeds the context. Texts of up to 512 tokens therefore need only
three programs: one per cache size to run pieces, and one to copy finished rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.distributed import processes
from jaxpersona.distributed.sharding import on_cpu
from jaxpersona.engine.pieces import (
    Call,
    blank_carry,
    large,
    light,
    may_hide_nonfinite,
    needs_whole,
    parts,
    schedule,
    zero_keys,
)
from jaxpersona.engine.rows import axis_of_rows, take_rows
from jaxpersona.engine.tasks import cache_size
from jaxpersona.interventions.compose import Interventions
from jaxpersona.models.batch import Batch
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.models.carry import Carry
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxtyping import Int

    from jaxpersona.models.model import Model

PIECE = 32  # number of tokens in a piece
ROWS = 4  # the default number of rows; with more rows, a single text would take longer
_LEAST_SLOTS = 256


class Step(NamedTuple):
    """The result of one call of the model.

    Attributes:
      members: [R] int32, the index of the text in each row, −1 for an empty row.
      call: the piece in each row.
      output: the second return value of the argument `run` of `in_pieces`.
      ended: the carry of the R rows on the host, without cache and gates; None if no text ends in
        this call.
    """

    members: Int[np.ndarray, " R"]
    call: Call
    output: Any
    ended: Carry | None


def fits_pieces(model: Model, edits: Interventions, capture: Capture) -> bool:
    """Return whether texts run in pieces instead of batches.

    Pieces require a single CPU device and a large model (`pieces.large`). They are not used if a
    gate needs the whole prompt in one call, or if a capture has one value per token, because its
    state has values for every cache slot and would be copied for every piece.
    """
    if needs_whole(edits) or not on_cpu(model.params.like) or not large(model.config):
        return False
    states = jax.eval_shape(lambda: capture.init(model.config, 1, 1))
    return not any(state.per_token for state in states.values())


def in_pieces(model: Model, rows: Sequence[chat.Row], edits: Interventions, capture: Capture, *,
              together: int, layers: int, run: Callable[..., tuple[Carry, Any]]) -> Iterator[Step]:
    """Run texts piece by piece and yield the result of each call.

    Args:
      model: the model.
      rows: N encoded texts.
      edits: interventions created without `rows=` or with N rows.
      capture: the activations to capture, without per-token captures.
      together: R, the number of rows.
      layers: the number of layers that `run` computes; the cache has only these.
      run: a function that runs the model and returns the new carry and an output. Its arguments
        are the carry (donated), a batch of R rows and `PIECE` tokens, the interventions on these
        rows, `Call.begins`, the batch axis of each leaf of `light(carry)` (static), and the token
        that follows each token of the batch, [R, PIECE] int32 (0 after the end of a text).
    """
    def blank(count: int, slots: int) -> Carry:
        made = blank_carry(model.config, model.params, edits, capture, rows=count, slots=slots,
                           layers=layers)
        return jax.tree.map(jnp.copy, made)  # donated buffers must be distinct

    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        slots = cache_size(row.tokens.size, model.config.max_context, least=_LEAST_SLOTS,
                           finer=None)
        groups.setdefault(max(slots, PIECE), []).append(i)
    for slots, group in sorted(groups.items(), reverse=True):  # largest caches first
        carry = blank(together, slots)
        of_rows = jax.tree.map(axis_of_rows, *(
            jax.eval_shape(lambda n=n, slots=slots: light(blank(n, slots))) for n in (1, 2)))
        axes, found_axes = (tuple(jax.tree.leaves(x)) for x in (of_rows, _found(of_rows)))
        whole: dict[int, Batch] = {}
        for call in schedule([rows[i].tokens.size for i in group], together, PIECE):
            members = np.array([-1 if j < 0 else group[j] for j in call.text], np.int32)
            for i in members[call.begins]:
                row = rows[i]
                whole[i] = make_batch([row.tokens], kind=[row.kind], turn=[row.turn])
            batch = parts([None if i < 0 else whole[i] for i in members], call.start, call.stop,
                          PIECE, together)
            following = np.zeros((together, PIECE), np.int32)
            for b, i in enumerate(members):
                after = [] if i < 0 else rows[i].tokens[call.start[b] + 1 : call.stop[b] + 1]
                following[b, : len(after)] = after
            carry, output = run(carry, batch.replace(chunk=True), edits.take(members),
                                jnp.asarray(call.begins), axes, following)
            ended = None
            if call.ends.any():
                ended = processes.fetch(take_rows(
                    _found(carry), np.arange(together, dtype=np.int32), axes=found_axes))
                unclean = call.ends & (may_hide_nonfinite(edits) | ~ended.finite)
                if unclean.any():
                    carry = zero_keys(carry, jnp.asarray(unclean))
                for i in members[call.ends]:
                    del whole[i]
            yield Step(members, call, output, ended)


def _found(carry: Carry) -> Carry:
    """Return the carry without its cache and gates.

    The shapes of the remaining fields do not depend on the number of slots.
    """
    return carry.replace(cache=None, gates=None)
