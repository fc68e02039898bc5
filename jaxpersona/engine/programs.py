"""The compiled programs of generation: prefill, and decoding as one loop on the device.

The loop's state is one pytree (`State`) that includes the cache and the states of the captures. The
step at which the loop stops is an array, so chunks of any length use the same program.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.distributed.sharding import of_each, place
from jaxpersona.engine.compiled import program
from jaxpersona.engine.pieces import blank_carry, light, reset
from jaxpersona.engine.sampling import Sampling, choose, finite, most_likely
from jaxpersona.interventions.compose import Interventions
from jaxpersona.models.batch import ASSISTANT, CODE, GENERATED, TEMPLATE, THINKING, VALID, Batch
from jaxpersona.models.cache import set_lines
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.forward import Output, forward
from jaxpersona.models.params import Params
from jaxpersona.text.fences import CODE_BIT

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Array, Bool, Int, UInt8, UInt32

TRACES: Counter[str] = Counter()  # the number of traces of each program, for tests and benchmarks


class State(flax.struct.PyTreeNode):
    """The state of B rows during generation.

    Attributes:
      carry: the state of `forward` after the tokens that were passed through the model.
        `carry.finite` also covers the logits. A row with non-finite logits ends without another
        token.
      token: [B] int32, the last selected token. It has not been passed through the model yet, so it
        is not in the cache, except in a row that ended at its limit.
      position: [B] int32, the position of `token`.
      turn: [B] int32, the index of the message being generated.
      row_id: [B] uint32, the id that seeds the random draws.
      done: [B] bool, True for finished and for free rows.
      thinking: [B] bool, True inside a thinking block.
      limit: [B] int32, the maximum number of tokens of the reply.
      length: [B] int32, the number of selected tokens, including a stop token.
      tokens: [B, M] int32, the selected tokens, followed by −1.
      step: [] int32, the number of decode steps since the state was created.
      fence: [B] int32, the state of the code-fence automaton (`fences`); None if no intervention or
        capture distinguishes code.
      matched: [B] int32, the state of the stop-string automaton; None without stop strings.
    """

    carry: Carry
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    turn: Int[Array, " B"]
    row_id: UInt32[Array, " B"]
    done: Bool[Array, " B"]
    thinking: Bool[Array, " B"]
    limit: Int[Array, " B"]
    length: Int[Array, " B"]
    tokens: Int[Array, "B M"]
    step: Int[Array, ""]
    fence: Int[Array, " B"] | None = None
    matched: Int[Array, " B"] | None = None


class Stops(flax.struct.PyTreeNode):
    """The stop tokens, thinking tags and transition tables, as arrays.

    Attributes:
      ids: [n] int32, the ids of the stop tokens (−1: none).
      think: [2] int32, the ids of the opening and closing thinking tags (−1: none).
      fences: [V, states] uint8, the transitions of `fences.table`; None if no intervention or
        capture distinguishes code.
      strings: [V, states] uint8, the transitions of `stopping.table`; None without stop strings.
    """

    ids: Int[Array | np.ndarray, " n"]
    think: Int[Array | np.ndarray, " 2"]
    fences: UInt8[Array, "V states"] | None = None
    strings: UInt8[Array, "V states"] | None = None

    @property
    def accepting(self) -> int | None:
        """The accepting state of the stop-string automaton; None without stop strings."""
        return None if self.strings is None else self.strings.shape[1] - 1


def free_rows(config: ModelConfig, params: Params, edits: Interventions, capture: Capture,
              stops: Stops, *, rows: int, slots: int, max_new: int) -> State:
    """Return a state in which every row is free, with the structure of `prefill`'s result.

    Args:
      config, params: the model's configuration and parameters.
      edits: the interventions on the B rows.
      capture: the activations to capture.
      stops: the stop tokens, thinking tags and transition tables.
      rows: the number of rows B.
      slots: S, the number of slots in the cache.
      max_new: M, the number of tokens that `State.tokens` can hold.
    """
    zeros = jnp.zeros((rows,), jnp.int32)
    blank = State(
        carry=blank_carry(config, params, edits, capture, rows=rows, slots=slots),
        token=zeros, position=zeros, turn=zeros, row_id=zeros.astype(jnp.uint32),
        done=jnp.ones((rows,), bool), thinking=jnp.zeros((rows,), bool), limit=zeros,
        length=zeros, tokens=jnp.full((rows, max_new), -1, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        fence=None if stops.fences is None else zeros,
        matched=None if stops.strings is None else zeros,
    )
    return jax.tree.map(jnp.copy, blank)  # donated buffers must be distinct


def _filled(params: Params, config: ModelConfig, batch: Batch, edits: Interventions,
            capture: Capture, stops: Stops, slots: int, max_new: int, **_: Any) -> Any:
    """Return the structure of `prefill`'s result, with `ShapeDtypeStruct` leaves."""
    blank = functools.partial(free_rows, config, params, edits, capture, stops, slots=slots,
                              rows=batch.tokens.shape[0], max_new=max_new)
    return jax.eval_shape(blank)


@program(static=("config", "slots"))
def prefill_prefix(params: Params, config: ModelConfig, batch: Batch, edits: Interventions,
                   capture: Capture, *, slots: int) -> Carry:
    """Return the carry after shared prefixes, one per row of `batch`, with a cache of S slots."""
    TRACES["prefix"] += 1
    return forward(params, config, batch.replace(chunk=True), interventions=edits, capture=capture,
                   slots=slots, logits=None, attention="auto").carry


@program(static=("config", "slots", "max_new", "greedy"), result=_filled)
def prefill(params: Params, config: ModelConfig, batch: Batch, edits: Interventions,
            capture: Capture, sampling: Sampling, stops: Stops, limit: jax.Array, *, slots: int,
            max_new: int, greedy: bool, prefix: Carry | None = None) -> State:
    """Run the model on the prompts and select the first token of each reply.

    Args:
      params, config: the model's parameters and configuration.
      batch: B prompts of T tokens. With `prefix`, it contains only the tokens after the prefix. A
        row without tokens is free.
      edits: the interventions on the B rows.
      capture: the activations to capture.
      sampling: the sampling settings of the B rows.
      stops: the stop tokens, thinking tags and transition tables.
      limit: [B] int32, the maximum number of tokens of each reply.
      slots: S, the number of slots in the new cache.
      max_new: M, the number of tokens that `State.tokens` can hold.
      greedy: whether every temperature is 0.
      prefix: the result of `prefill_prefix` for B rows, with a cache of S slots, or None.
    """
    TRACES["prefill"] += 1
    batch = batch.spread(params.like)
    if prefix is None:
        out = forward(params, config, batch, interventions=edits, capture=capture,
                      slots=slots, logits="last", attention="auto")
    else:
        out = forward(params, config, batch.replace(chunk=True), interventions=edits,
                      capture=capture, carry=prefix, logits="last")
    return _first_tokens(out, batch, sampling, stops, limit, batch.length > 0, max_new, greedy)


def _first_tokens(out: Output, batch: Batch, sampling: Sampling, stops: Stops, limit: jax.Array,
                  ends: jax.Array, max_new: int, greedy: bool) -> State:
    """Return the state after a prefill call, with the first token of each reply that begins.

    Args:
      out: the result of `forward` on the batch.
      batch: the tokens of this call: B prompts, their parts after a prefix, or one piece of each.
      sampling, stops, limit, max_new, greedy: as for `prefill`.
      ends: [B] bool, the rows whose prompt ends in this batch. For other rows, no token is
        selected.
    """
    assert out.cache is not None
    rows = batch.tokens.shape[0]
    at = jnp.maximum(batch.length - 1, 0)
    kind = of_each(batch.kind.astype(jnp.int32), at)
    # The tokens of a generation prompt have the turn index of the reply. Without a generation
    # prompt, the reply has the next index.
    begins = ((kind & TEMPLATE) == 0).astype(jnp.int32)
    zeros = jnp.zeros_like(batch.length)
    state = State(
        carry=out.carry,
        token=jnp.zeros((rows,), jnp.int32),
        position=out.cache.next - 1,
        turn=of_each(batch.turn, at) + begins,
        row_id=jnp.asarray(batch.row_id),
        done=~ends,
        thinking=(kind & THINKING) != 0,
        limit=limit,
        length=jnp.zeros((rows,), jnp.int32),
        tokens=jnp.full((rows, max_new), -1, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        fence=None if stops.fences is None else zeros,
        matched=None if stops.strings is None else zeros,
    )
    return _choose_next(state, out.logits, sampling, stops, greedy, ran=ends)


@program(static=("config", "axes", "greedy"), donate=("state",), result=lambda state, **_: state)
def prefill_piece(params: Params, config: ModelConfig, state: State, batch: Batch,
                  edits: Interventions, capture: Capture, sampling: Sampling, stops: Stops,
                  limit: jax.Array, begins: jax.Array, ends: jax.Array, *, axes: tuple[int, ...],
                  greedy: bool) -> State:
    """Run the next piece, a chunk of T tokens, of each prompt (chunked prefill).

    At a prompt's end, the first token of the reply is selected.

    Args:
      params, config, edits, capture, sampling, stops, limit, greedy: as for `prefill`.
      state: the state of B rows after the earlier pieces (donated). Of its values, only the carry
        is used.
      batch: the next T tokens of each prompt; an empty row is free.
      begins: [B] bool, the rows whose prompt begins in this piece. Their state is reset, except for
        old keys and values, which are masked because the positions of their slots are reset.
      ends: [B] bool, the rows whose prompt ends in this piece.
      axes: the batch axis of each leaf of the state's carry without keys and values (`light`).
    """
    TRACES["prefill"] += 1
    carry = reset(state.carry, begins, config, params, edits, capture, axes)
    out = forward(params, config, batch.replace(chunk=True), interventions=edits, capture=capture,
                  carry=carry, logits="last")
    return _first_tokens(out, batch, sampling, stops, limit, ends, state.tokens.shape[1], greedy)


def without_keys(state: State) -> State:
    """Return a state without its keys and values."""
    return state.replace(carry=light(state.carry))


@program(static=("config", "greedy"), donate=("state",), result=lambda state, **_: state)
def decode(params: Params, config: ModelConfig, state: State, edits: Interventions,
           capture: Capture, sampling: Sampling, stops: Stops, until: jax.Array,
           most_done: jax.Array | None = None, *, greedy: bool) -> State:
    """Run decode steps until `most_done` rows are done or `State.step` reaches `until`.

    A step passes each row's pending token through the model and selects the next one. A token that
    reaches the length limit is also passed through the model, so that its activations are captured.

    Args:
      params, config: the model's parameters and configuration.
      state: the state of B rows (donated).
      edits: the interventions on the B rows.
      capture: the activations to capture.
      sampling: the sampling settings of the B rows.
      stops: the stop tokens, thinking tags and transition tables.
      until: [] int32, the value of `State.step` at which the loop stops.
      most_done: [] int32, the number of done rows at which the loop stops; None: all rows.
      greedy: whether every temperature is 0.
    """
    TRACES["decode"] += 1
    ready = edits.prepare(state.token.shape[0], params.like)

    def pending(state: State) -> jax.Array:
        enough = state.done.all() if most_done is None else state.done.sum() >= most_done
        return (state.step < until) & ~enough

    def step(state: State) -> State:
        kind = VALID | ASSISTANT | GENERATED | THINKING * state.thinking.astype(jnp.int32)
        tag = (state.token[:, None] == stops.think[None]).any(-1)
        kind = jnp.where(tag, kind | THINKING, kind)
        fence = state.fence
        if stops.fences is not None:
            entry = stops.fences.at[state.token, fence].get(mode="clip").astype(jnp.int32)
            kind = jnp.where(entry >= CODE_BIT, kind | CODE, kind)
            fence = entry & (CODE_BIT - 1)
        kind = jnp.where(state.done, 0, kind).astype(jnp.uint16)
        one = Batch(tokens=state.token[:, None], position=state.position[:, None],
                    kind=kind[:, None], turn=state.turn[:, None], row_id=state.row_id)
        out = forward(params, config, one, interventions=ready, capture=capture,
                      carry=state.carry, logits="last")
        opened = state.thinking | (state.token == stops.think[0])
        thinking = opened & (state.token != stops.think[1])
        advanced = state.replace(
            # `_choose_next` checks the logits instead; XLA removes the unused check in `forward`
            carry=out.carry.replace(finite=state.carry.finite),
            done=state.done | (state.length >= state.limit),
            thinking=jnp.where(state.done, state.thinking, thinking),
            step=state.step + 1,
            fence=fence,
        )
        return _choose_next(advanced, out.logits, sampling, stops, greedy, ran=~state.done)

    return jax.lax.while_loop(pending, step, state)


def _choose_next(state: State, logits: jax.Array, sampling: Sampling, stops: Stops, greedy: bool, *,
                 ran: jax.Array) -> State:
    """Select the next token of each row that is not done; set `done` if this token ends the row.

    A row with non-finite logits ends without a token. All rows on which the model ran (`ran`, [B]
    bool) are checked, including rows at their length limit, whose last token is also captured.
    """
    position = state.position + 1
    if greedy:
        token = most_likely(logits)
    else:
        token = choose(logits, sampling, state.row_id, position)
    # a non-finite residual stream yields non-finite logits (`forward.head`)
    assert state.carry.finite is not None
    valid = state.carry.finite & (finite(logits, token if greedy else None) | ~ran)
    live = valid & ~state.done
    slot = jnp.where(live, state.length, state.tokens.shape[1])
    stopped, matched = (token[:, None] == stops.ids[None]).any(-1), state.matched
    if stops.strings is not None:
        matched = stops.strings.at[token, matched].get(mode="clip").astype(jnp.int32)
        stopped |= matched == stops.accepting
    return state.replace(
        token=jnp.where(live, token, state.token),
        position=jnp.where(live, position, state.position),
        length=state.length + live.astype(jnp.int32),
        tokens=set_lines(place(state.tokens, ("batch", None), token), token, slot, lines=1),
        done=state.done | ~valid | stopped,
        carry=state.carry.replace(finite=valid),
        matched=matched,
    )
