"""Generation of replies to any number of conversations with a fixed batch size.

Reproducibility: The batch size B is fixed for a call; if there are fewer conversations, the batch
is padded. A conversation's padded length, cache size and random draws depend only on that
conversation, its id and its settings. With the same device and package versions, its tokens and
captures are therefore bit-identical regardless of the other conversations and their order. With
another batch size or device, only the random draws are the same.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import count, line
from jaxpersona.calls import checked_call
from jaxpersona.captures.capture import Capture, joined
from jaxpersona.captures.missing import describe_empty
from jaxpersona.distributed import processes
from jaxpersona.distributed.context import own_context
from jaxpersona.distributed.sharding import off_mesh
from jaxpersona.engine import prompts
from jaxpersona.engine.edits import SharedEdits
from jaxpersona.engine.lanes import Lane
from jaxpersona.engine.nonfinite import NonfiniteWarning, OnNonfinite, check_choice, explain
from jaxpersona.engine.programs import State, Stops
from jaxpersona.engine.replies import UNSHOWN, Finished, record, unpack
from jaxpersona.engine.sampling import Sampling, sampling
from jaxpersona.engine.scheduler import Collect, Scheduler
from jaxpersona.engine.stats import RunStats, Stats
from jaxpersona.engine.stopping import text_of
from jaxpersona.engine.tasks import Setting, Task, piece_of, prefix_key, shape_of
from jaxpersona.errors import UserError
from jaxpersona.export import Table, shapes
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.interventions.trace import Applied
from jaxpersona.models.batch import CODE
from jaxpersona.models.model import check_model
from jaxpersona.models.prepared import fast_params
from jaxpersona.progress import shows, tokens
from jaxpersona.runtime import debugging
from jaxpersona.text import chat, fences

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, UInt32

    from jaxpersona.models.model import Model

Progress = Callable[[int, int, int], None]
_LOG = logging.getLogger("jaxpersona")


@dataclasses.dataclass(frozen=True)
class Generated(Table):
    """Replies to N conversations, in input order.

    Attributes:
      text: the N replies without the stop token; "" if the model has no tokenizer.
      tokens: the token ids of the replies without the stop token, N arrays [n] int32.
      stopped: [N] bool, True if a stop token ended the reply.
      rows: the encoded prompts.
      captured: the result of each reading by name: an array [N, L, …] for L layers; a list of N
        arrays [L, T, …] if there is one value for each of the T tokens of prompt and reply; or a
        pytree of arrays [N, …], such as `Moments`. A mean over no tokens, for example in an empty
        reply, is NaN; a logged warning lists these conversations.
      applied: one `Applied` per intervention table; `seen` is [N], and `changed` is [l, N], where l
        is the number of layers of the table.
      finish: the reason why each reply ended: "stop" (a stop token), "length" (the limit), or
        "nonfinite" (an activation or a logit was NaN or infinite; discard the captures).
      stats: the counts of decode steps, live rows, and prompt tokens with and without padding.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.generate(jp.load("mini"), ["Who are you?"], max_new_tokens=2)
      Generated(1 reply, 2 tokens)
    """

    text: list[str]
    tokens: list[Int[np.ndarray, " n"]]
    stopped: Bool[np.ndarray, " N"]
    rows: list[chat.Row]
    captured: dict[str, Any]
    applied: tuple[Applied, ...]
    finish: list[str]
    stats: RunStats = RunStats()

    def __repr__(self) -> str:
        return line("Generated", count(len(self.text), "reply"),
                    count(sum(len(t) for t in self.tokens), "token"),
                    f"captured: {', '.join(self.captured)}" if self.captured else "")

    def records(self) -> list[dict[str, Any]]:
        """Return one record per conversation.

        The keys are `prompt` (the last message, or `Row.text` if there are no messages), `reply`,
        `tokens` (the number of tokens in the reply), `finish`, `messages` (of the prompt) and `ids`
        (the token ids of the reply). With interventions, `seen` and `changed` contain one number
        per table: the number of tokens selected by its token test, and the maximum over layers of
        the number of changed tokens.
        """
        return [record(row, text, tokens, finish,
                       [(table.seen[i], table.changed[:, i]) for table in self.applied])
                for i, (row, text, tokens, finish) in enumerate(
                    zip(self.rows, self.text, self.tokens, self.finish, strict=True))]

    def facts(self) -> dict[str, Any]:
        """Return the shapes of the captured arrays; the arrays themselves are not exported."""
        return shapes(self.captured)

    def _left_out(self, column: str) -> bool:
        return column in UNSHOWN


@checked_call
@shows(tokens("generate"))
@own_context()
def generate(
    model: Model,
    conversations: Iterable[Any],
    *,
    interventions: Interventions | None = None,
    capture: Capture | Sequence[Capture] | None = None,
    max_new_tokens: Any = 512,
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
    progress: Progress | bool | None = None,
) -> Generated:
    """Generate a reply to each conversation.

    Args:
      model: the result of `load`.
      conversations: an iterable of N conversations, each a list of {"role", "content"}, a string
        (one user message), a `chat.Row`, or token ids.
      interventions: edits of the activations, created without `rows=` or with one row per
        conversation.
      capture: a capture of the activations of prompts and replies, or a list of captures.
      max_new_tokens: the maximum number of tokens in a reply, a number or [N]. The model's context
        also limits the length of a reply.
      temperature, top_p, top_k, seed: the sampling settings, each a number or [N]
        (`sampling.Sampling`).
      batch_size: B, the number of rows in the compiled programs.
      ids: [N] uint32, the ids that seed the random draws together with `seed`; default: a hash of a
        conversation's tokens and of the number of earlier conversations with the same tokens.
      thinking: whether a reply may begin with a thinking block.
      share_prefix: whether to prefill the tokens before the first user message separately, once for
        all conversations that share these tokens, the interventions and the cache size. Rounding
        differs slightly from prefill in one pass, but results are equally reproducible.
      refill: whether to assign conversations to free rows while other rows still decode; if False,
        wait until all rows of the batch are finished. The results are bit-identical in both cases.
      on_nonfinite: the response to NaN or infinite activations. "warn": end the reply
        (`Generated.finish`) and issue one `NonfiniteWarning` that names the first affected layer
        and a fix. "raise": raise a `UserError`. `jax_debug_nans` and `jax_debug_infs` imply
        "raise".
      progress: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called with three counts instead: finished conversations, all
        conversations, and tokens in the finished replies.

    Returns:
      The replies and captured activations, in input order.

    Raises:
      UserError: there are no conversations, a conversation is invalid, a prompt fills the context,
        a setting is out of range or not supported on the model's mesh, the interventions or the
        captures do not match the model or the number of conversations, or activations are not
        finite and `on_nonfinite` is "raise".

    Examples:
      >>> import jaxpersona as jp
      >>> out = jp.generate(jp.load("mini"), ["Who are you?"], max_new_tokens=2)
      >>> len(out.text), len(out.tokens[0]), out.finish
      (1, 2, ['length'])
    """
    check_model(model)
    check_choice(on_nonfinite)
    prompts.check_settings(batch_size=batch_size)
    conversations = chat.listed(conversations)
    count = len(conversations)
    most = prompts.reply_limits(max_new_tokens, count, model.config.max_context)
    edits, readings = off_mesh((given(interventions), joined(capture)))
    prompts.check_edits(model, edits, count, readings)
    prompts.check_rows(model, batch_size, share_prefix)
    settings = sampling(count, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    rows = [prompts.encode(model, item, thinking=thinking, name=f"conversation {i}")
            for i, item in enumerate(conversations)]
    limits = prompts.limits(model, rows, most)
    draw_ids = prompts.row_ids(rows, ids)
    readings = Capture() if readings is None else readings
    out = _Collector(count)
    stop = on_nonfinite == "raise" or debugging()

    def explanation() -> str:
        i = min(out.nonfinite)
        affected, done = len(out.nonfinite), len(out.done)
        return explain(model, chat.answered(model.tokenizer, rows[i], out.done[i].tokens),
                       edits.take([i]), f"conversation {i}",
                       f"{affected} of {done} replies ended because of")

    def collect(tasks: list[Task], places: np.ndarray, state: State) -> None:
        out.add(tasks, places, state)
        if out.nonfinite and stop:
            raise UserError(explanation())
        if callable(progress):
            progress(len(out.done), count, out.total)

    stops, stats = stops_of(model, asks_for_code(edits, readings)), Stats()
    queue(model, rows, draw_ids, limits, settings, edits, readings, stops, collect,
          max_new=most, batch_size=batch_size, share_prefix=share_prefix, refill=refill,
          stats=stats).run()
    if out.nonfinite:
        message = explanation()  # runs the model, so all processes must call it
        if processes.first():
            warnings.warn(message, NonfiniteWarning, stacklevel=5)
    return out.finish(model, rows, stats.snapshot())


def queue(model: Model, rows: list[chat.Row], ids: UInt32[np.ndarray, " N"],
          limits: Int[np.ndarray, " N"], settings: Sampling, edits: Interventions,
          capture: Capture, stops: Stops, collect: Collect, *, max_new: Int[np.ndarray, " N"],
          batch_size: int, share_prefix: bool = False, refill: bool = True,
          stats: Stats | None = None) -> Scheduler:
    """Return a scheduler whose queue contains all prompts.

    Args:
      model: the model.
      rows: N encoded prompts.
      ids: [N] uint32, the ids that seed the random draws.
      limits: [N] int32, the maximum number of tokens in each reply, within the model's context.
      settings: the sampling settings of N rows.
      edits: interventions created without `rows=` or with N rows.
      capture: the activations to capture.
      stops: the stop tokens, thinking tags and transition tables.
      collect: a function that is called with finished tasks, the indices of their rows in a state,
        and this state. A task's `number` is the index of its prompt.
      max_new: [N] int32, the requested maximum number of tokens in each reply. Together with the
        prompt's length, it determines the number of cache slots of the prompt's lane.
      batch_size: B, the number of rows in the compiled programs.
      share_prefix, refill: as in `generate`.
      stats: the counters to update, or None.
    """
    greedy = bool((np.asarray(settings.temperature) == 0).all())
    piece, shared = piece_of(model.config, model.params.like, edits, batch_size), SharedEdits(edits)
    scheduler = Scheduler(
        lane_opener(model, shared, capture, stops, greedy, batch_size, stats), collect,
        refill=refill)
    shapes = [shape_of(row, int(most), share_prefix, model.config.max_context, batch_size, piece)
              for row, most in zip(rows, max_new, strict=True)]
    tasks = [Task(i, row, int(ids[i]), int(limits[i]), settings.take([i]), shapes[i],
                  shapes[i].slots)
             for i, row in enumerate(rows)]
    order = {slots: place for place, slots in enumerate(dict.fromkeys(t.lane for t in tasks))}
    # Sort by shape and prefix, because prompts of the same shape are prefilled together and a lane
    # stores only a few prefixes. Within each group, start replies with the largest limits first, so
    # that few rows are free at the end.
    scheduler.waiting.extend(sorted(tasks, key=lambda task: (
        order[task.lane], task.shape, prefix_key(task),
        shared.key(task) if task.shape.prefix else (), -task.limit)))
    return scheduler


def lane_opener(model: Model, edits: SharedEdits, capture: Capture, stops: Stops, greedy: bool,
                batch_size: int, stats: Stats | None = None) -> Callable[[Any], Lane]:
    """Return a function for `Scheduler` that opens a lane with a given number of cache slots.

    Args:
      model, capture, stops, batch_size, stats: as for `queue`.
      edits: the interventions on all prompts.
      greedy: whether every temperature is 0.
    """
    params = fast_params(model, batch_size)
    # On a mesh, all rows are replaced at once. Rows are sharded over devices, so writing only some
    # of them would need communication.
    together = max(1, batch_size // 4) if model.mesh is None else batch_size
    piece = piece_of(model.config, model.params.like, edits.edits, batch_size)

    def open_lane(slots: Any) -> Lane:
        # `State.tokens` has one entry per slot, so that programs do not depend on length limits
        return Lane(model.config, params, Setting(slots, slots, greedy, capture, stops), edits,
                    batch_size, together, piece, stats)

    return open_lane


def asks_for_code(edits: Interventions, capture: Capture) -> bool:
    """Return whether any edit, gate or capture selects tokens in code blocks.

    The result is True for tables from `reserve`, because edits that select code may be written to
    them later.
    """
    if any(edit.reserved for edit in edits.edits):
        return True
    tests = [reading.where for reading in capture.readings.values()]
    for edit in edits.edits:
        tests += [edit.where] if edit.gate is None else [edit.where, edit.gate.where]
    # NOWHERE selects no token although all its bits are set; as an integer, it is negative
    return any(((code >= 0) & ((code & CODE) != 0)).any()
               for code in (np.asarray(test).reshape(-1, 5)[:, :3] for test in tests))


def stops_of(model: Model, code: bool) -> Stops:
    """Return the stop tokens and thinking tags and, if `code` is True, the code-fence table.

    Without a tokenizer, the thinking tags are −1, and there is no code-fence table.
    """
    ids = list(model.stop_ids) or [-1]
    ids += [-1] * (-len(ids) % 4)  # pad to a multiple of 4, so that more models share programs
    tokenizer = model.tokenizer
    think = (-1, -1) if tokenizer is None else chat.thinking_ids(tokenizer)
    table = None
    if code and tokenizer is not None:
        table = jnp.asarray(fences.table(tokenizer, model.config.vocab_size))
    return Stops(ids=jnp.asarray(ids, jnp.int32), think=jnp.asarray(think, jnp.int32),
                 fences=table)


class _Collector:
    """The finished replies of a `generate` call, by conversation index."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.total = 0
        self.done: dict[int, Finished] = {}
        self.nonfinite: list[int] = []

    def add(self, tasks: list[Task], rows: np.ndarray, state: State) -> None:
        """Store the replies of finished tasks, copied from their rows of a state."""
        for task, finished in zip(tasks, unpack(state, rows), strict=True):
            self.done[task.number] = finished
            self.total += finished.tokens.size
            if finished.nonfinite:
                self.nonfinite.append(task.number)

    def finish(self, model: Model, rows: list[chat.Row], stats: RunStats) -> Generated:
        """Return the results without stop tokens, in the order of the conversations.

        For each capture that selected no token in some conversations, a warning is logged.
        """
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
                         captured, applied, finish, stats)
