"""Generate replies for any number of conversations, at one batch size.

Promise: the batch size B is fixed for a call and short batches are padded; a conversation's prompt
and cache lengths and its random draws are functions of that conversation alone. So its tokens and
captures are bit for bit the same alone, in any packing, in any order, on one device and one set of
versions. Across batch sizes or devices only the draws are the same.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona import chat, fences
from jaxpersona.batch import CODE, KINDS, Batch
from jaxpersona.batch import batch as make_batch
from jaxpersona.capture import Capture, TokenState
from jaxpersona.decode import State, Stops, decode, prefill
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.sampling import sampling
from jaxpersona.sharding import rows_divisor
from jaxpersona.trace import Applied

if TYPE_CHECKING:
    from jaxpersona.load import Model

Progress = Callable[[int, int, int], None]
_CHUNK = 64  # steps between two looks at the device


@dataclasses.dataclass(frozen=True)
class Generated:
    """Replies to N conversations, in their order.

    Attributes:
      text: the replies, without the stop token (or "" each where the model has no tokenizer).
      tokens: their ids, without the stop token.
      stopped: [N] bool; False where the length limit cut the reply.
      rows: the prompts as they were encoded (`chat.Row`).
      captured: each reading by its name: [N, L, …], or for readings a token a list of N arrays
        [L, T, …] over the prompt's and the reply's tokens.
      applied: one `Applied` for each table: seen [N], changed [l, N].
    """

    text: list[str]
    tokens: list[np.ndarray]
    stopped: np.ndarray
    rows: list[chat.Row]
    captured: dict[str, Any]
    applied: tuple[Applied, ...]


def generate(
    model: Model,
    conversations: Sequence[Any],
    *,
    interventions: Interventions | None = None,
    capture: Capture | None = None,
    max_new_tokens: int = 512,
    temperature: Any = 0.0,
    top_p: Any = 1.0,
    top_k: Any = 0,
    seed: Any = 0,
    batch_size: int = 32,
    ids: Sequence[int] | None = None,
    thinking: bool = False,
    progress: Progress | None = None,
) -> Generated:
    """Generate a reply to each conversation.

    Args:
      model: what `load` returned.
      conversations: each a list of {"role", "content"}, a string (one user message), a `chat.Row`,
        or token ids.
      interventions: for all alike, or with one row a conversation.
      capture: what to read off the prompts' and replies' activations.
      max_new_tokens: the most tokens of a reply; less where the model's context ends before.
      temperature, top_p, top_k, seed: a number, or one a conversation (`sampling.Sampling`).
      batch_size: B, the rows of the compiled programs.
      ids: [N] uint32, what each conversation is for its random draws; default: a hash of its
        tokens and of how often they came before in this call.
      thinking: let a model that can think do so before it answers.
      progress: called with (conversations done, N, tokens so far).

    Raises:
      ValueError: no conversation, a prompt as long as the context, settings out of range,
        interventions of another model or number of rows; field, value and mend.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size ({batch_size}) and max_new_tokens ({max_new_tokens}) must be positive"
        )
    if isinstance(conversations, str):
        raise ValueError("conversations is one string; give a list of conversations")
    # the model's own bound, so that no buffer is made for tokens that cannot come
    max_new_tokens = min(max_new_tokens, model.config.max_context)
    count = len(conversations)
    if not count:
        raise ValueError("conversations is empty; give at least one")
    edits = given(interventions)
    _check_edits(model, edits, capture, count)
    ways = rows_divisor(model.params.embed_vd)
    if batch_size % ways:
        raise ValueError(f"batch_size is {batch_size}; the mesh spreads rows over {ways} devices: "
                         f"use a multiple of {ways}")
    how = sampling(count, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    greedy = bool((np.asarray(how.temperature) == 0).all())
    rows = [_encode(model, item, thinking) for item in conversations]
    limits = _limits(model, rows, max_new_tokens)
    names = _row_ids(rows, ids)
    out = _Collector(count)
    done = 0
    for (width, slots), members in _groups(rows, max_new_tokens).items():
        for at in range(0, len(members), batch_size):
            chosen = members[at : at + batch_size]
            index = np.array(chosen + [-1] * (batch_size - len(chosen)), np.int32)
            state = _run(model, _pad([rows[i] for i in chosen], names[chosen], width, batch_size),
                         edits.take(index), capture, how.take(index), limits[index],
                         slots, max_new_tokens, greedy)
            out.add(chosen, state)
            done += len(chosen)
            if progress is not None:
                progress(done, count, out.total)
    return out.finish(model, rows)


def bucket(tokens: int) -> int:
    """Return the least of 32, 64, 128, 256, 384, 512, 768, 1024, … that holds `tokens`.

    Few of them, because each is a program to compile.
    """
    size = 32
    while size < tokens:
        power = size & (size - 1) == 0
        size = (size * 2 if size < 256 else size * 3 // 2) if power else size * 4 // 3
    return size


def _run(model: Model, batch: Batch, edits: Interventions, capture: Capture | None, how: Any,
         limit: np.ndarray, slots: int, max_new: int, greedy: bool) -> State:
    capture = capture if capture is not None else Capture()
    stops = _stops(model, _asks_for_code(edits, capture))
    batch = jax.tree.map(jnp.asarray, batch)
    state = prefill(model.params, model.config, batch, edits, capture, how, stops,
                    jnp.asarray(limit, jnp.int32), slots=slots, max_new=max_new, greedy=greedy)
    for step in range(_CHUNK, max_new + _CHUNK, _CHUNK):
        state = decode(model.params, model.config, state, edits, capture, how, stops,
                       jnp.asarray(step, jnp.int32), greedy=greedy)
        if bool(state.done.all()):
            break
    return state


def _asks_for_code(edits: Interventions, capture: Capture) -> bool:
    """Whether a test of an intervention or a capture looks at code, or may come to do so."""
    if any(edit.reserved for edit in edits.edits):
        return True
    tests = [part.where for part in capture.parts.values()]
    for edit in edits.edits:
        tests += [edit.where] if edit.gate is None else [edit.where, edit.gate.where]
    # a test that no token passes (`where.NOWHERE`) has every bit
    return any(((code >= 0) & ((code & CODE) != 0)).any()
               for code in (np.asarray(test).reshape(-1, 5)[:, :3] for test in tests))


def _stops(model: Model, code: bool) -> Stops:
    ids = list(model.stop_ids) or [-1]
    ids += [-1] * (-len(ids) % 4)  # a few lengths, so that models of one shape share programs
    tokenizer = model.tokenizer
    think = (-1, -1) if tokenizer is None else chat.thinking_ids(tokenizer)
    known = None
    if code and tokenizer is not None:
        known = jnp.asarray(fences.table(tokenizer, model.config.vocab_size))
    return Stops(ids=jnp.asarray(ids, jnp.int32), think=jnp.asarray(think, jnp.int32),
                 fences=known)


def _encode(model: Model, item: Any, thinking: bool) -> chat.Row:
    if isinstance(item, chat.Row):
        return item
    if item is None or isinstance(item, int):
        raise ValueError(f"a conversation is {item!r}; give messages, a string, a Row or token ids")
    text = isinstance(item, str) or (
        len(item) > 0 and all(isinstance(message, dict) for message in item)
    )
    if text:
        if model.tokenizer is None:
            raise ValueError("the model has no tokenizer; give token ids instead of text")
        return chat.encode_row(model.tokenizer, item, thinking=thinking)
    tokens = np.asarray(item)
    if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError("a conversation must be messages, a string, a Row or a list of token ids")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise ValueError(f"token ids must lie in 0…{model.config.vocab_size - 1}")
    kind = np.full(tokens.size, KINDS["user"], np.int32)
    return chat.Row(tokens.astype(np.int32), kind, np.zeros(tokens.size, np.int32), "")


def _check_edits(model: Model, edits: Interventions, capture: Capture | None,
                 count: int) -> None:
    edits.check(layers=model.config.n_layers, width=model.config.d_model, rows=count)
    mine = int(model.fingerprint[8:], 16)
    named = [edit.origin for edit in edits.edits]
    named += [edit.gate.origin for edit in edits.edits if edit.gate is not None]
    named += [part.origin for part in (capture.parts.values() if capture is not None else ())
              if hasattr(part, "origin")]
    foreign = {int(o) for origin in named for o in np.asarray(origin)} - {0, mine}
    if foreign:
        raise ValueError(
            f"a direction was made for another model than {model.name} (fingerprint "
            f"{model.fingerprint}); use one of this model's, or pass its bare array "
            "(`axis.values`) to apply it all the same"
        )


def _limits(model: Model, rows: list[chat.Row], max_new: int) -> np.ndarray:
    context = model.config.max_context
    for i, row in enumerate(rows):
        if row.tokens.size >= context:
            raise ValueError(
                f"prompt {i} has {row.tokens.size} tokens; the model's context holds {context}, "
                "the reply included: shorten it"
            )
    return np.array([min(max_new, context - row.tokens.size) for row in rows], np.int32)


def _row_ids(rows: list[chat.Row], ids: Sequence[int] | None) -> np.ndarray:
    if ids is not None:
        if len(ids) != len(rows):
            raise ValueError(f"ids has {len(ids)} entries for {len(rows)} conversations")
        given = np.asarray(ids)
        if not np.issubdtype(given.dtype, np.integer) or given.min() < 0 or given.max() >= 2**32:
            raise ValueError(f"ids must be integers in 0…2³²−1; they begin with {list(ids)[:4]}")
        return given.astype(np.uint32)
    seen: Counter[bytes] = Counter()
    out = []
    for row in rows:
        key = row.tokens.tobytes()
        out.append(chat.row_id(row.tokens, seen[key]))
        seen[key] += 1
    return np.array(out, np.uint32)


def _groups(rows: list[chat.Row], max_new: int) -> dict[tuple[int, int], list[int]]:
    """Group conversations by prompt width and cache slots, each a function of the row alone."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        width = bucket(row.tokens.size)
        groups[width, -(-(width + max_new) // 64) * 64].append(i)
    return dict(groups)


def _pad(rows: list[chat.Row], ids: np.ndarray, width: int, size: int) -> Batch:
    """Make a batch of `size` rows, the missing ones empty."""
    real = make_batch([r.tokens for r in rows], kind=[r.kind for r in rows],
                      turn=[r.turn for r in rows], row_id=ids, width=width)
    extra = size - len(rows)
    return jax.tree.map(lambda x: np.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)), real)


class _Collector:
    """Put batches' results back into the order of the conversations."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.total = 0
        self.tokens: dict[int, np.ndarray] = {}
        self.stopped = np.zeros(count, bool)
        self.values: dict[str, dict[int, Any]] = defaultdict(dict)
        self.ragged: set[str] = set()
        self.applied: list[tuple[list[int], tuple[Applied, ...]]] = []

    def add(self, members: list[int], state: State) -> None:
        """Take over one batch's rows."""
        keep = (state.tokens, state.length, state.cache.next, state.captured, state.applied)
        tokens, length, used, captured, applied = jax.device_get(keep)
        values = {name: part.value for name, part in captured.items()}
        for name, part in captured.items():
            if isinstance(part, TokenState):
                self.ragged.add(name)
        for row, i in enumerate(members):
            # every content token was run; a stop token was chosen but never run
            ran = int(used[row])
            self.tokens[i] = tokens[row, : length[row]]
            for name, value in values.items():
                mine = jax.tree.map(operator.itemgetter(row), value)
                self.values[name][i] = np.array(mine[:, :ran]) if name in self.ragged else (
                    jax.tree.map(np.array, mine))
        self.applied.append((members, applied))
        self.total += int(length[: len(members)].sum())

    def finish(self, model: Model, rows: list[chat.Row]) -> Generated:
        """Cut the stop tokens off and put everything in order."""
        stops = set(model.stop_ids)
        tokens = []
        for i in range(self.count):
            ids = self.tokens[i]
            self.stopped[i] = bool(ids.size) and int(ids[-1]) in stops
            tokens.append(ids[:-1] if self.stopped[i] else ids)
        text = [""] * self.count
        if model.tokenizer is not None:
            text = [model.tokenizer.decode(t.tolist(), skip_special_tokens=True) for t in tokens]
        captured = {
            name: [by_row[i] for i in range(self.count)] if name in self.ragged
            else jax.tree.map(lambda *x: np.stack(x), *(by_row[i] for i in range(self.count)))
            for name, by_row in self.values.items()
        }
        return Generated(text, tokens, self.stopped, rows, captured, self._counts())

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
