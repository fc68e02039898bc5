"""Prefill and decode as two compiled programs; the whole decode is one loop on the device.

The state that goes round the loop is a pytree: cache, captures and counts grow in it, and a bound
on the number of steps is data, so a caller may stop between chunks without another program.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.captures.capture import Capture
from jaxpersona.distributed.sharding import of_each, place
from jaxpersona.engine.compiled import program
from jaxpersona.engine.sampling import Sampling, choose, finite, most_likely
from jaxpersona.interventions.compose import Interventions
from jaxpersona.models.batch import ASSISTANT, CODE, GENERATED, TEMPLATE, THINKING, VALID, Batch
from jaxpersona.models.cache import set_lines
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.forward import forward
from jaxpersona.models.params import Params
from jaxpersona.text.fences import CODE_BIT

TRACES: Counter[str] = Counter()  # how often each program was traced, for tests and benches


class State(flax.struct.PyTreeNode):
    """A batch in the midst of being generated.

    Attributes:
      carry: the carry of `forward`: everything but `token` has run. `carry.finite` [B] bool also
        covers the logits; False ends a row, and a token chosen from such logits is dropped.
      token: [B] int32, chosen but not yet run.
      position: [B] int32, the position of `token`.
      turn: [B] int32, the message being written.
      row_id: [B] uint32.
      done: [B] bool, rows with nothing left to run.
      thinking: [B] bool, rows inside a thinking block.
      limit: [B] int32, the most tokens a row may get.
      length: [B] int32, tokens chosen so far, a stop token included.
      tokens: [B, M] int32, the tokens chosen; −1 beyond `length`.
      step: [] int32, steps taken.
      fence: [B] int32, whether a row is inside fenced code (`fences`), or None where none asks.
      matched: [B] int32, how far a row's text has come towards a stop string, or None likewise.
    """

    carry: Carry
    token: Any
    position: Any
    turn: Any
    row_id: Any
    done: Any
    thinking: Any
    limit: Any
    length: Any
    tokens: Any
    step: Any
    fence: Any = None
    matched: Any = None


class Stops(flax.struct.PyTreeNode):
    """Token ids that matter to the loop, as data.

    Attributes:
      ids: [n] int32, any of which ends a row (−1: none).
      think: [2] int32, the opening and closing ids of a thinking block (−1: none).
      fences: [V, states] uint8, `fences.table`, or None where nothing asks for code.
      strings: [V, states] uint8, `stopping.table`, or None where no text ends a row.
    """

    ids: Any
    think: Any
    fences: Any = None
    strings: Any = None

    @property
    def accepting(self) -> int | None:
        """The automaton's accepting state, its last one; None without stop strings."""
        return None if self.strings is None else self.strings.shape[1] - 1


@program(static=("config", "slots"))
def prefill_prefix(params: Params, config: ModelConfig, batch: Batch, edits: Interventions,
                   capture: Capture, *, slots: int) -> Carry:
    """Run the beginnings of prompts, which nothing is sampled from."""
    TRACES["prefix"] += 1
    return forward(params, config, batch.replace(chunk=True), interventions=edits, capture=capture,
                   slots=slots, logits=None, attention="auto").carry


@program(static=("config", "slots", "max_new", "greedy"))
def prefill(params: Params, config: ModelConfig, batch: Batch, edits: Interventions,
            capture: Capture, how: Sampling, stops: Stops, limit: jax.Array, *, slots: int,
            max_new: int, greedy: bool, prefix: Carry | None = None) -> State:
    """Run the prompts, or what follows their prefix, and choose each row's first token."""
    TRACES["prefill"] += 1
    rows = batch.tokens.shape[0]
    batch = batch.spread(params.embed_vd)
    if prefix is None:
        out = forward(params, config, batch, interventions=edits, capture=capture,
                      slots=slots, logits="last", attention="auto")
    else:
        out = forward(params, config, batch.replace(chunk=True), interventions=edits,
                      capture=capture, carry=prefix, logits="last")
    assert out.cache is not None
    length = batch.length
    at = jnp.maximum(length - 1, 0)
    kind = of_each(batch.kind.astype(jnp.int32), at)
    # a template's last scaffold belongs to the reply already; a bare prompt is the turn before it
    begins = ((kind & TEMPLATE) == 0).astype(jnp.int32)
    state = State(
        carry=out.carry,
        token=jnp.zeros((rows,), jnp.int32),
        position=out.cache.next - 1,
        turn=of_each(batch.turn, at) + begins,
        row_id=batch.row_id,
        done=length == 0,
        thinking=(kind & THINKING) != 0,
        limit=limit,
        length=jnp.zeros((rows,), jnp.int32),
        tokens=jnp.full((rows, max_new), -1, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        fence=None if stops.fences is None else jnp.zeros_like(length),
        matched=None if stops.strings is None else jnp.zeros_like(length),
    )
    return _choose_next(state, out.logits, how, stops, greedy, ran=length > 0)


@program(static=("config", "greedy"), donate=("state",))
def decode(params: Params, config: ModelConfig, state: State, edits: Interventions,
           capture: Capture, how: Sampling, stops: Stops, until: jax.Array,
           most_done: jax.Array | None = None, *, greedy: bool) -> State:
    """Run steps until `most_done` rows are done (None: every row) or `until` steps were taken.

    A step runs every pending token (so that its activation is read even when the length limit ends
    the row there) and chooses the next.
    """
    TRACES["decode"] += 1
    ready = edits.prepare(state.token.shape[0], params.embed_vd)

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
        grown = state.replace(
            # the logits' check in `_choose_next` covers this step, so XLA removes forward's own
            carry=out.carry.replace(finite=state.carry.finite),
            done=state.done | (state.length >= state.limit),
            thinking=jnp.where(state.done, state.thinking, thinking),
            step=state.step + 1,
            fence=fence,
        )
        return _choose_next(grown, out.logits, how, stops, greedy, ran=~state.done)

    return jax.lax.while_loop(pending, step, state)


def _choose_next(state: State, logits: jax.Array, how: Sampling, stops: Stops, greedy: bool, *,
                 ran: jax.Array) -> State:
    """Choose a token for every row that is not done, and note whether it ends the row.

    Logits that are not finite end a row without a token. They are looked at in every row that `ran`
    [B], also where the length limit ends it here: its last activations are read as well.
    """
    position = state.position + 1
    if greedy:
        token = most_likely(logits)
    else:
        token = choose(logits, how, state.row_id, position)
    # NaN and infinity anywhere in a residual reach its logits (`forward.head`)
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
