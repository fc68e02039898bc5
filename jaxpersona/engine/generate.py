"""Generate replies for any number of conversations, at one batch size.

Promise: the batch size B is fixed for a call and short batches are padded; a conversation's prompt
and cache lengths and its random draws are functions of that conversation alone. So its tokens and
captures are bit for bit the same alone, in any packing, in any order, on one device and one set of
versions. Across batch sizes or devices only the draws are the same.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.captures.missing import describe_empty
from jaxpersona.distributed import processes
from jaxpersona.distributed.context import own_context
from jaxpersona.distributed.sharding import off_mesh, rows_divisor
from jaxpersona.engine import prompts
from jaxpersona.engine.edits import SharedEdits
from jaxpersona.engine.lanes import (
    Lane,
    Setting,
    Task,
    prefix_key,
    shape_of,
)
from jaxpersona.engine.nonfinite import NonfiniteWarning, OnNonfinite, check_choice, explain
from jaxpersona.engine.programs import State, Stops
from jaxpersona.engine.replies import Finished, unpack
from jaxpersona.engine.sampling import Sampling, sampling
from jaxpersona.engine.scheduler import Collect, Scheduler
from jaxpersona.engine.stopping import text_of
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.interventions.trace import Applied
from jaxpersona.models.batch import CODE
from jaxpersona.models.prepared import fast_params
from jaxpersona.runtime import debugging
from jaxpersona.text import chat, fences

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

Progress = Callable[[int, int, int], None]
_LOG = logging.getLogger("jaxpersona")


@dataclasses.dataclass(frozen=True)
class Generated:
    """Replies to N conversations, in their order.

    Attributes:
      text: the replies, without the stop token (or "" each where the model has no tokenizer).
      tokens: their ids, without the stop token.
      stopped: [N] bool; True where a stop token ended the reply.
      rows: the prompts as they were encoded (`chat.Row`).
      captured: each reading by its name: [N, L, …], or for readings a token a list of N arrays
        [L, T, …] over the prompt's and the reply's tokens. A mean over no token, as of an empty
        reply, is NaN; the log names such conversations.
      applied: one `Applied` for each table: seen [N], changed [l, N].
      finish: N reasons why the replies ended: "stop" (a stop token), "length" (the limit), or
        "nonfinite" (a residual or a logit was NaN or infinite: what was read of that conversation
        is not to be used).
    """

    text: list[str]
    tokens: list[np.ndarray]
    stopped: np.ndarray
    rows: list[chat.Row]
    captured: dict[str, Any]
    applied: tuple[Applied, ...]
    finish: list[str]


@own_context()
def generate(
    model: Model,
    conversations: Iterable[Any],
    *,
    interventions: Interventions | None = None,
    capture: Capture | None = None,
    max_new_tokens: int = 512,
    temperature: Any = 0.0,
    top_p: Any = 1.0,
    top_k: Any = 0,
    seed: Any = 0,
    batch_size: int = 32,
    ids: Iterable[int] | None = None,
    thinking: bool = False,
    share_prefix: bool = False,
    refill: bool = True,
    on_nonfinite: OnNonfinite = "warn",
    progress: Progress | None = None,
) -> Generated:
    """Generate a reply to each conversation.

    Args:
      model: what `load` returned.
      conversations: an iterable of conversations, each a list of {"role", "content"}, a string (one
        user message), a `chat.Row`, or token ids.
      interventions: for all alike, or with one row a conversation.
      capture: what to read off the prompts' and replies' activations.
      max_new_tokens: the most tokens of a reply; less where the model's context ends before.
      temperature, top_p, top_k, seed: a number, or one a conversation (`sampling.Sampling`).
      batch_size: B, the rows of the compiled programs.
      ids: [N] uint32, what each conversation is for its random draws; default: a hash of its
        tokens and of how often they came before in this call.
      thinking: let a model that can think do so before it answers.
      share_prefix: compute what stands before the first user message in a pass of its own, once
        for all conversations that share it. Rounding differs from that of one pass; the promise
        holds as well.
      refill: give a finished row to the next conversation at once; False waits until every row
        of the batch is finished. The results are the same, bit for bit.
      on_nonfinite: what to do where a conversation's activations are NaN or infinite. "warn":
        end its reply there (`Generated.finish`) and give one `NonfiniteWarning` with the first
        layer and what helps; "raise": stop with that as an error. With `jax_debug_nans` or
        `jax_debug_infs` it is "raise".
      progress: called with (conversations done, N, tokens so far).

    Raises:
      UserError: no conversation, a prompt as long as the context, settings out of range,
        interventions of another model or number of rows, or activations that are not finite and
        `on_nonfinite="raise"`; argument, value and fix.
    """
    check_choice(on_nonfinite)
    prompts.check_settings(capture, batch_size=batch_size, max_new_tokens=max_new_tokens)
    conversations = chat.listed(conversations)
    # the model's own bound, so that no buffer is made for tokens that cannot come
    max_new_tokens = min(max_new_tokens, model.config.max_context)
    count = len(conversations)
    edits, capture = off_mesh((given(interventions), capture))
    prompts.check_edits(model, edits, count, capture)
    ways = rows_divisor(model.params.embed_vd)
    if batch_size % ways:
        raise UserError(f"batch_size is {batch_size}; the mesh spreads rows over {ways} devices: "
                         f"use a multiple of {ways}")
    if share_prefix and model.mesh is not None:
        raise UserError("share_prefix is for one device; leave it off for a model on a mesh")
    how = sampling(count, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    rows = [prompts.encode(model, item, thinking=thinking) for item in conversations]
    limits = prompts.limits(model, rows, max_new_tokens)
    names = prompts.row_ids(rows, ids)
    capture = Capture() if capture is None else capture
    out = _Collector(count)
    stop = on_nonfinite == "raise" or debugging()

    def explained() -> str:
        i = min(out.nonfinite)
        hit, done = len(out.nonfinite), len(out.done)
        return explain(model, chat.answered(model.tokenizer, rows[i], out.done[i].tokens),
                       edits.take([i]), f"conversation {i}", f"{hit} of {done} replies ended at")

    def collect(tasks: list[Task], state: State) -> None:
        out.add(tasks, state)
        if out.nonfinite and stop:
            raise UserError(explained())
        if progress is not None:
            progress(len(out.done), count, out.total)

    stops = stops_of(model, asks_for_code(edits, capture))
    drain(model, rows, names, limits, how, edits, capture, stops, collect,
          max_new=max_new_tokens, batch_size=batch_size, share_prefix=share_prefix, refill=refill)
    if out.nonfinite:
        said = explained()  # by all processes together
        if processes.first():
            warnings.warn(said, NonfiniteWarning, stacklevel=3)
    return out.finish(model, rows)


def drain(model: Model, rows: list[chat.Row], names: np.ndarray, limits: np.ndarray, how: Sampling,
          edits: Interventions, capture: Capture, stops: Stops, collect: Collect, *, max_new: int,
          batch_size: int, share_prefix: bool = False, refill: bool = True) -> None:
    """Give all prompts to a scheduler and run it until no one is left.

    Args:
      rows: N encoded prompts.
      names: [N] uint32, what each is for its random draws.
      limits: [N] int32, the most tokens of each reply; at most `max_new`.
      how, edits: of N rows; or edits for all alike.
      collect: called with finished prompts, whose `number` is their place, and a state whose first
        rows are theirs.
    """
    greedy = bool((np.asarray(how.temperature) == 0).all())
    params, shared = fast_params(model, batch_size), SharedEdits(edits)
    # a mesh spreads rows over devices, where exchanging single ones would move all
    together = max(1, batch_size // 4) if model.mesh is None else batch_size

    def open_lane(slots: Any) -> Lane:
        return Lane(model.config, params, Setting(slots, max_new, greedy, capture, stops), shared,
                    batch_size, together)

    scheduler = Scheduler(open_lane, collect, refill=refill)
    shapes = [shape_of(row, max_new, share_prefix) for row in rows]
    tasks = [Task(i, row, int(names[i]), int(limits[i]), how.take([i]), shapes[i], shapes[i].slots)
             for i, row in enumerate(rows)]
    order = {slots: place for place, slots in enumerate(dict.fromkeys(t.lane for t in tasks))}
    # neighbours in the queue share a shape, and a prefix, so that few of these are kept
    scheduler.waiting.extend(sorted(tasks, key=lambda task: (
        order[task.lane], task.shape, prefix_key(task),
        shared.key(task) if task.shape.prefix else ())))
    while not scheduler.idle:
        scheduler.step()


def asks_for_code(edits: Interventions, capture: Capture) -> bool:
    """Whether a test of an intervention or a capture looks at code, or may come to do so."""
    if any(edit.reserved for edit in edits.edits):
        return True
    tests = [part.where for part in capture.readings.values()]
    for edit in edits.edits:
        tests += [edit.where] if edit.gate is None else [edit.where, edit.gate.where]
    # a test that no token passes (`where.NOWHERE`) has every bit
    return any(((code >= 0) & ((code & CODE) != 0)).any()
               for code in (np.asarray(test).reshape(-1, 5)[:, :3] for test in tests))


def stops_of(model: Model, code: bool) -> Stops:
    ids = list(model.stop_ids) or [-1]
    ids += [-1] * (-len(ids) % 4)  # a few lengths, so that models of one shape share programs
    tokenizer = model.tokenizer
    think = (-1, -1) if tokenizer is None else chat.thinking_ids(tokenizer)
    known = None
    if code and tokenizer is not None:
        known = jnp.asarray(fences.table(tokenizer, model.config.vocab_size))
    return Stops(ids=jnp.asarray(ids, jnp.int32), think=jnp.asarray(think, jnp.int32),
                 fences=known)


class _Collector:
    """Put finished replies back into the order of the conversations."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.total = 0
        self.done: dict[int, Finished] = {}
        self.nonfinite: list[int] = []

    def add(self, tasks: list[Task], state: State) -> None:
        """Take the rows of tasks from a state."""
        for task, finished in zip(tasks, unpack(state, tasks), strict=True):
            self.done[task.number] = finished
            self.total += finished.tokens.size
            if finished.nonfinite:
                self.nonfinite.append(task.number)

    def finish(self, model: Model, rows: list[chat.Row]) -> Generated:
        """Remove the stop tokens and put everything in order."""
        done = [self.done[i] for i in range(self.count)]
        for name in done[0].captured:
            if empty := [i for i, one in enumerate(done) if name in one.empty]:
                _LOG.warning("capture %r %s", name,
                             describe_empty(empty, self.count, "conversation"))
        stops = set(model.stop_ids)
        stopped = np.array([bool(x.tokens.size) and int(x.tokens[-1]) in stops for x in done])
        tokens = [x.tokens[:-1] if end else x.tokens for x, end in zip(done, stopped, strict=True)]
        finish = ["nonfinite" if x.nonfinite else "stop" if end else "length"
                  for x, end in zip(done, stopped, strict=True)]
        captured = {
            name: [x.captured[name] for x in done] if name in done[0].per_token
            else jax.tree.map(lambda *x: np.stack(x), *(x.captured[name] for x in done))
            for name in done[0].captured
        }
        applied = tuple(Applied(np.array([x.applied[table].seen for x in done], np.int32),
                                np.stack([x.applied[table].changed for x in done], 1))
                        for table in range(len(done[0].applied)))
        return Generated([text_of(model.tokenizer, t) for t in tokens], tokens, stopped, rows,
                         captured, applied, finish)
