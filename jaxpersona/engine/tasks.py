"""Tasks: prompts with their settings, and the static sizes of the programs that run them.

The static sizes of a prompt depend only on that prompt, on its limit and on the number of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.distributed.sharding import on_cpu
from jaxpersona.engine.pieces import needs_whole, parts
from jaxpersona.engine.programs import Stops
from jaxpersona.engine.prompts import FEW_ROWS, bucket, padded
from jaxpersona.engine.sampling import Sampling
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions
from jaxpersona.models.batch import LAST, USER, Batch
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.text.chat import Row

PIECE = 16  # tokens; a multiple of it wastes few tokens of a prompt, and keeps products large
_LEAST_SLOTS = 256  # with pieces: role prompts and replies of up to 128 tokens share one lane
_SHORTEST_PREFIX = 16  # tokens; a shorter common prefix is not prefilled separately


class Edits(Protocol):
    """The interventions on a lane's rows."""

    def structure(self, rows: int) -> Interventions:
        """Return placeholder interventions on `rows` rows with the lane's structure."""
        ...

    def of(self, tasks: Sequence[Task | None], rows: int) -> Interventions:
        """Return interventions on `rows` rows: those of `tasks`, and neutral ones for the rest."""
        ...

    def assign(self, edits: Interventions, rows: np.ndarray) -> None:
        """Assign interventions on n rows to the rows [n] of the lane; row index B is ignored."""
        ...

    def of_rows(self, tasks: Sequence[Task | None]) -> Interventions:
        """Return the interventions on all rows of the lane; None marks a free row."""
        ...

    def key(self, task: Task) -> tuple:
        """Return a key that is equal for tasks with equal interventions."""
        ...


@dataclasses.dataclass(eq=False)
class Task:
    """A prompt that a lane runs.

    Attributes:
      number: its index among the prompts of a call, or in the order of requests.
      row: the encoded prompt.
      row_id: uint32, seeds its random draws.
      limit: the maximum number of tokens in its reply.
      sampling: its sampling settings, as arrays of one row.
      shape: the static sizes for its prefill.
      lane: the key of its lane.
      edits: its interventions on one row, for `RowEdits`; None for `SharedEdits`.
      cancelled: whether it was cancelled and is removed without a result.
    """

    number: int
    row: Row
    row_id: int
    limit: int
    sampling: Sampling
    shape: Shape
    lane: Hashable
    edits: Interventions | None = None
    cancelled: bool = False


class Setting(NamedTuple):
    """The settings that all rows of a lane share.

    Attributes:
      slots: S of the cache.
      max_new: the maximum number of tokens in a reply.
      greedy: whether every temperature is 0.
      capture: the readings.
      stops: the tokens that end a row.
    """

    slots: int
    max_new: int
    greedy: bool
    capture: Capture
    stops: Stops


class Shape(NamedTuple):
    """The static sizes for a prompt's prefill, which do not depend on other prompts.

    Attributes:
      prefix: the padded length of the shared prefix; 0 if there is none.
      width: the padded length of the prompt without the shared prefix; with pieces, the length of
        a piece.
      slots: the number of cache slots S.
    """

    prefix: int
    width: int
    slots: int


def piece_of(like: jax.Array, edits: Interventions, rows: int) -> int | None:
    """Return the number of tokens in a piece, or None if a prompt runs in one call.

    On a CPU, where the time of a call is proportional to its tokens, a prompt runs in pieces of
    `PIECE` tokens, so that prompts of all lengths share one program with little padding. On a GPU
    or TPU, where calls with few tokens take as long as those with many, and for a gate that needs
    the whole prompt, it runs in one call; so do the prompts of small batches, which need few
    programs without pieces (`prompts.padded`).

    Args:
      like: an array on the device of the parameters.
      edits: interventions with the lane's structure.
      rows: B of the lane.
    """
    return None if needs_whole(edits) or rows <= FEW_ROWS or not on_cpu(like) else PIECE


def shape_of(row: Row, max_new: int, share_prefix: bool, context: int, rows: int,
             piece: int | None = None) -> Shape:
    """Return the static sizes for a prompt.

    Args:
      row: the prompt.
      max_new: the maximum number of tokens in the reply.
      share_prefix: whether the prefix is computed separately.
      context: the model's context in tokens.
      rows: B of the lane.
      piece: the number of tokens in a piece (`piece_of`).
    """
    shared = prefix_length(row) if share_prefix else 0
    prefix = padded(shared, rows) if shared else 0
    if piece is not None:  # padding takes no slots
        needed = max(prefix, row.tokens.size + max_new)
        return Shape(prefix, piece, cache_size(needed, context, least=_LEAST_SLOTS))
    width = padded(row.tokens.size - shared, rows)
    if rows > FEW_ROWS:
        return Shape(prefix, width, cache_size(prefix + width + max_new, context))
    needed = max(prefix + width, row.tokens.size + max_new)
    return Shape(prefix, width, cache_size(needed, context, least=256, finer=None))


def shape_within(row: Row, limit: int, sizes: Sequence[int],
                 piece: int | None = None) -> tuple[Shape, int]:
    """Return the lengths of a prompt's programs for given cache sizes, and its reply's limit.

    Args:
      row: the prompt.
      limit: the maximum number of tokens of the reply.
      sizes: the cache sizes, ascending.
      piece: the number of tokens in a piece (`piece_of`).

    Raises:
      UserError: the prompt leaves no room in the largest cache.
    """
    width = taken = bucket(row.tokens.size)
    if piece is not None:
        width, taken = piece, row.tokens.size
    if taken >= sizes[-1]:
        padding = f", padded to {taken}" if piece is None else ""
        raise UserError(f"the conversation has {row.tokens.size} tokens{padding}; "
                        f"the engine's largest cache holds {sizes[-1]}, including the "
                        "reply: shorten it, or create the engine with larger sizes")
    limit = min(limit, sizes[-1] - taken)
    return Shape(0, width, next(x for x in sizes if x >= taken + limit)), limit


def cache_size(tokens: int, context: int, *, least: int = 64, finer: int | None = 512) -> int:
    """Return the number of cache slots for at most `tokens` tokens.

    The result is the smallest of 64, 128, 256, 512, 768, 1,024, 1,536, 2,048, … that is at least
    `tokens`. If this size exceeds the context, the result is `tokens` rounded up to a multiple of
    64.
    There are few sizes so that prompts of different lengths share a lane; with more sizes and
    lanes, many rows would be free.

    Args:
      tokens: the number of tokens.
      context: the model's context in tokens.
      least, finer: the list of sizes (`bucket`).
    """
    size = bucket(tokens, least=least, finer=finer)
    return size if size <= context else -(-tokens // 64) * 64


def prefix_length(row: Row) -> int:
    """Return the number of tokens before the first user message; 0 if below the minimum."""
    users = np.flatnonzero(row.kind & USER)
    length = int(users[0]) if users.size else 0
    return length if length >= _SHORTEST_PREFIX else 0


def prefix_key(task: Task) -> tuple:
    """Return a key that is equal for prompts with the same prefix; () without a prefix."""
    n = prefix_length(task.row) if task.shape.prefix else 0
    row = task.row
    return tuple(x[:n].tobytes() for x in (row.tokens, row.kind, row.turn)) if n else ()


def cut(chosen: Sequence[Task | None], start: Sequence[int], stop: Sequence[int], width: int,
        size: int, chunk: bool) -> Batch:
    """Return a batch of `size` rows with tokens start…stop−1 of each prompt; added rows are empty.

    Args:
      chosen: n ≤ `size` tasks; None is an empty row.
      start, stop: n token indices each.
      width: T of the batch.
      size: B of the batch.
      chunk: whether the tokens are only part of each prompt.
    """
    whole = [None if task is None else make_batch(
        [task.row.tokens], kind=[task.row.kind & ~LAST], turn=[task.row.turn],
        row_id=[task.row_id]) for task in chosen]
    return parts(whole, start, stop, width, size).replace(chunk=chunk)
