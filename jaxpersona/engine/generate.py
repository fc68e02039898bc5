"""Generate replies for any number of conversations, at one batch size.

Promise: the batch size B is fixed for a call and short batches are padded; a conversation's prompt
and cache lengths and its random draws are functions of that conversation alone. So its tokens and
captures are bit for bit the same alone, in any packing, in any order, on one device and one set of
versions. Across batch sizes or devices only the draws are the same.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.capture import Capture, TokenState
from jaxpersona.captures.missing import describe_empty, result_of
from jaxpersona.distributed import processes
from jaxpersona.distributed.sharding import off_mesh, on_own_mesh, rows_divisor
from jaxpersona.engine import prompts
from jaxpersona.engine.edits import SharedEdits
from jaxpersona.engine.lanes import (
    Lane,
    Setting,
    Task,
    fast_params,
    prefix_key,
    shape_of,
)
from jaxpersona.engine.nonfinite import NonfiniteWarning, OnNonfinite, check_choice, explain
from jaxpersona.engine.programs import State, Stops
from jaxpersona.engine.sampling import Sampling, sampling
from jaxpersona.engine.scheduler import Collect, Scheduler
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.interventions.trace import Applied
from jaxpersona.models.batch import CODE
from jaxpersona.runtime import debugging, own_rules
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


@on_own_mesh
@own_rules()
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
      ValueError: no conversation, a prompt as long as the context, settings out of range,
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
        raise ValueError(f"batch_size is {batch_size}; the mesh spreads rows over {ways} devices: "
                         f"use a multiple of {ways}")
    if share_prefix and model.mesh is not None:
        raise ValueError("share_prefix is for one device; leave it off for a model on a mesh")
    how = sampling(count, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    rows = [prompts.encode(model, item, thinking=thinking) for item in conversations]
    limits = prompts.limits(model, rows, max_new_tokens)
    names = prompts.row_ids(rows, ids)
    capture = Capture() if capture is None else capture
    out = _Collector(count)
    stop = on_nonfinite == "raise" or debugging()

    def explained() -> str:
        i = min(out.nonfinite)
        hit, done = len(out.nonfinite), len(out.tokens)
        return explain(model, chat.answered(model.tokenizer, rows[i], out.tokens[i]),
                       edits.take([i]), f"conversation {i}", f"{hit} of {done} replies ended at")

    def collect(tasks: list[Task], state: State) -> None:
        out.add([task.number for task in tasks], state)
        if out.nonfinite and stop:
            raise ValueError(explained())
        if progress is not None:
            progress(len(out.tokens), count, out.total)

    stops = stops_of(model, asks_for_code(edits, capture))
    drain(model, rows, names, limits, how, edits, capture, stops, collect,
          max_new=max_new_tokens, batch_size=batch_size, share_prefix=share_prefix, refill=refill)
    if out.nonfinite:
        said = explained()  # by all processes together
        if processes.first():
            warnings.warn(said, NonfiniteWarning, stacklevel=4)
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
    tests = [part.where for part in capture.parts.values()]
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
    """Put batches' results back into the order of the conversations."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.total = 0
        self.tokens: dict[int, np.ndarray] = {}
        self.stopped = np.zeros(count, bool)
        self.values: dict[str, dict[int, Any]] = defaultdict(dict)
        self.ragged: set[str] = set()
        self.empty: dict[str, list[int]] = defaultdict(list)  # rows of which no token was read
        self.applied: list[tuple[list[int], tuple[Applied, ...]]] = []
        self.nonfinite: list[int] = []

    def add(self, members: list[int], state: State) -> None:
        """Take over one batch's rows."""
        keep = (state.tokens, state.length, state.cache.next, state.captured, state.applied,
                state.nonfinite)
        tokens, length, used, captured, applied, nonfinite = processes.fetch(keep)
        values = {name: result_of(part) for name, part in captured.items()}
        for name, part in captured.items():
            if hasattr(part, "empty"):
                self.empty[name] += [i for i, none in zip(members, part.empty, strict=False)
                                     if none]
            if isinstance(part, TokenState):
                self.ragged.add(name)
        for row, i in enumerate(members):
            # every content token was run; a stop token was chosen but never run
            ran = int(used[row])
            self.tokens[i] = tokens[row, : length[row]]
            if nonfinite[row]:
                self.nonfinite.append(i)
            for name, value in values.items():
                mine = jax.tree.map(operator.itemgetter(row), value)
                self.values[name][i] = np.array(mine[:, :ran]) if name in self.ragged else (
                    jax.tree.map(np.array, mine))
        self.applied.append((members, applied))
        self.total += int(length[: len(members)].sum())

    def finish(self, model: Model, rows: list[chat.Row]) -> Generated:
        """Cut the stop tokens off and put everything in order."""
        for name, rows_of in self.empty.items():
            if rows_of:
                _LOG.warning("capture %r %s", name,
                             describe_empty(sorted(rows_of), self.count, "conversation"))
        stops, bad = set(model.stop_ids), set(self.nonfinite)
        tokens, finish = [], []
        for i in range(self.count):
            ids = self.tokens[i]
            self.stopped[i] = bool(ids.size) and int(ids[-1]) in stops
            finish.append("nonfinite" if i in bad else "stop" if self.stopped[i] else "length")
            tokens.append(ids[:-1] if self.stopped[i] else ids)
        text = [""] * self.count
        if model.tokenizer is not None:
            text = [model.tokenizer.decode(t.tolist(), skip_special_tokens=True) for t in tokens]
        captured = {
            name: [by_row[i] for i in range(self.count)] if name in self.ragged
            else jax.tree.map(lambda *x: np.stack(x), *(by_row[i] for i in range(self.count)))
            for name, by_row in self.values.items()
        }
        return Generated(text, tokens, self.stopped, rows, captured, self._counts(), finish)

    def _counts(self) -> tuple[Applied, ...]:
        tables = len(self.applied[0][1])
        out = []
        for number in range(tables):
            layers = self.applied[0][1][number].changed.shape[0]
            seen = np.zeros(self.count, np.int32)
            changed = np.zeros((layers, self.count), np.int32)
            for members, applied in self.applied:
                seen[members] = applied[number].seen[: len(members)]
                changed[:, members] = applied[number].changed[:, : len(members)]
            out.append(Applied(seen, changed))
        return tuple(out)
