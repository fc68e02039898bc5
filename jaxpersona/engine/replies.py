"""Finished replies: `Finished` (a row copied from a lane) and `Reply` (a request's result)."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxpersona.brief import brief, count, line, quoted
from jaxpersona.distributed import processes
from jaxpersona.engine.programs import State
from jaxpersona.engine.rows import take_row
from jaxpersona.engine.tasks import Task
from jaxpersona.export import Table, shapes
from jaxpersona.interventions.trace import Applied
from jaxpersona.text.chat import Row

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Finished:
    """One finished row of a state, copied to the host.

    Attributes:
      tokens: [n] int32, the generated token ids, including the stop token if there is one.
      captured: the captured values by name: [L, …] for L layers, or [L, T, …] for per-token
        captures, where T counts the tokens of prompt and reply that were passed through the model.
      per_token: the names of the per-token captures.
      empty: the names of the captures that selected no token.
      applied: one `Applied` per intervention table; `seen` is [], and `changed` is [l], where l is
        the number of layers of the table.
      nonfinite: whether an activation or a logit was not finite.
      matched: whether a stop string ended the reply.
    """

    __repr__ = brief

    tokens: Int[np.ndarray, " n"]
    captured: dict[str, Any]
    per_token: frozenset[str]
    empty: frozenset[str]
    applied: tuple[Applied, ...]
    nonfinite: bool
    matched: bool


@dataclasses.dataclass(frozen=True)
class Reply(Table):
    """The reply to one request.

    Attributes:
      text: the reply without the stop token, up to the first stop string; "" without a tokenizer.
      tokens: [n] int32, the generated token ids without the stop token. The last token may complete
        a stop string.
      finish: the reason why the reply ended: "stop" (a stop token or a stop string), "length" (the
        limit), "cancelled", or "nonfinite" (an activation or a logit was NaN or infinite; discard
        the captures).
      row: the encoded prompt.
      captured: the captured values by name: [L, …] for L layers, or [L, T, …] for per-token
        captures of the T tokens of prompt and reply. A stop token, or a token that completes a stop
        string, is neither passed through the model nor captured. Empty for a cancelled request.
      applied: one `Applied` per intervention table; `seen` is [], and `changed` is [l], where l is
        the number of layers of the table. Empty for a cancelled request.

    Examples:
      >>> import jaxpersona as jp
      >>> engine = jp.Engine(jp.load("mini"), rows=2)
      >>> handle = engine.submit(jp.Request("Who are you?", max_new_tokens=2))
      >>> engine.result(handle).finish
      'length'
    """

    text: str
    tokens: Int[np.ndarray, " n"]
    finish: str
    row: Row
    captured: dict[str, Any]
    applied: tuple[Applied, ...]

    def __repr__(self) -> str:
        return line("Reply", quoted(self.text, 60), count(len(self.tokens), "token"), self.finish)

    def records(self) -> list[dict[str, Any]]:
        """Return a list with one record, which has the keys of `Generated.records`."""
        return [record(self.row, self.text, self.tokens, self.finish,
                       [(table.seen, table.changed) for table in self.applied])]

    def facts(self) -> dict[str, Any]:
        """Return the shapes of the captured arrays; the arrays themselves are not exported."""
        return shapes(self.captured)

    def _left_out(self, column: str) -> bool:
        return column in UNSHOWN


UNSHOWN = ("messages", "ids")  # columns of `record` that are not shown in notebooks


def record(row: Row, text: str, tokens: np.ndarray, finish: str,
           applied: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Return a reply as a dictionary of plain Python values.

    Args:
      row, text, tokens, finish: see the attributes of `Reply`.
      applied: the pair (seen [], changed [l]) of each intervention table.
    """
    messages = [dict(message) for message in row.messages or ()]
    found = {"prompt": messages[-1]["content"] if messages else row.text, "reply": text,
             "tokens": len(tokens), "finish": finish, "messages": messages,
             "ids": tokens.tolist()}
    if applied:
        found["seen"] = [int(seen) for seen, _ in applied]
        found["changed"] = [int(np.max(changed, initial=0)) for _, changed in applied]
    return found


def unpack(state: State, rows: np.ndarray, accepting: int | None = None) -> list[Finished]:
    """Copy rows of a state to the host.

    Args:
      state: the state of a lane.
      rows: [n] int, the indices of the rows to copy.
      accepting: the accepting state of the lane's stop strings (`Stops.accepting`), or None.
    """
    carry = state.carry
    assert carry.cache is not None
    keep = (state.tokens, state.length, carry.cache.next, carry.captured, carry.applied,
            carry.finite, state.matched)
    tokens, length, used, captured, applied, finite, progress = processes.fetch(keep)
    values = {name: reading.result() for name, reading in captured.items()}
    per_token = frozenset(name for name, reading in captured.items() if reading.per_token)
    out = []
    for row in rows.tolist():
        ran = int(used[row])  # a stop token is not passed through the model
        own = {name: jax.tree.map(operator.itemgetter(row), value)
               for name, value in values.items()}
        out.append(Finished(
            tokens=tokens[row, : length[row]],
            captured={name: np.array(value[:, :ran]) if name in per_token
                      else jax.tree.map(np.array, value) for name, value in own.items()},
            per_token=per_token,
            empty=frozenset(name for name, reading in captured.items() if reading.empty[row]),
            applied=tuple(Applied(table.seen[row], table.changed[:, row]) for table in applied),
            nonfinite=not bool(finite[row]),
            matched=accepting is not None and int(progress[row]) == accepting,
        ))
    return out


def so_far(state: State, streamed: Sequence[tuple[int, Task, list[str]]],
           stop_ids: Sequence[int] = ()) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Copy the tokens and projections of unfinished replies to the host.

    Args:
      state: the state of a lane.
      streamed: for each reply, its row, its task and the names of its projection captures.
      stop_ids: the ids of the stop tokens.

    Returns:
      For each reply, its tokens [n] without a stop token and its projections [n, L, K] by name.
      With projections, a last token that has not been passed through the model yet is omitted.
    """
    carry, captured = state.carry, state.carry.captured or {}
    assert carry.cache is not None
    tokens, length, used = processes.fetch((state.tokens, state.length, carry.cache.next))
    out = []
    for i, task, names in streamed:
        start, count, values = task.row.tokens.size, int(length[i]), {}
        count -= bool(count) and int(tokens[i, count - 1]) in stop_ids
        for name in names:
            count = min(count, int(used[i]) - start)
            read = processes.fetch(take_row(captured[name].values, np.int32(i)))
            values[name] = np.moveaxis(read, 2, 0)[start : start + count]
        out.append((tokens[i, :count], values))
    return out
