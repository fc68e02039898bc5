"""Tasks: prompts with their settings, and the static sizes of the programs that run them.

The static sizes for a prompt do not depend on other prompts. A piece is a chunk of consecutive
tokens of a prompt that one call of the model prefills.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.distributed.sharding import on_cpu
from jaxpersona.engine.pieces import large, needs_whole, parts
from jaxpersona.engine.programs import Stops
from jaxpersona.engine.prompts import FEW_ROWS, bucket, padded
from jaxpersona.engine.sampling import Sampling
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions
from jaxpersona.models.batch import LAST, USER, Batch
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.models.config import ModelConfig
from jaxpersona.text.chat import Row

# number of tokens per piece: small enough to limit padding, large enough for fast matrix products
PIECE = 16
_LEAST_SLOTS = 256  # minimum cache size in slots with pieces, so that short prompts share a lane
_SHORTEST_PREFIX = 16  # minimum number of tokens of a shared prefix that is prefilled separately


class Edits(Protocol):
    """The interventions on a lane's rows."""

    def structure(self, rows: int) -> Interventions:
        """Return interventions with the static structure that programs of `rows` rows have.

        Their values are placeholders.
        """
        ...

    def of(self, tasks: Sequence[Task | None], rows: int) -> Interventions:
        """Return the interventions of `tasks` on `rows` rows; None marks a row without a task."""
        ...

    def assign(self, edits: Interventions, rows: np.ndarray) -> None:
        """Assign interventions on n rows to rows of the lane.

        Args:
          edits: the interventions on n rows.
          rows: [n] int32, the lane row for each row of `edits`; rows with index B are skipped.
        """
        ...

    def of_rows(self, tasks: Sequence[Task | None]) -> Interventions:
        """Return the interventions on all rows of the lane; None marks a free row."""
        ...

    def key(self, task: Task) -> tuple:
        """Return a key for the task's interventions; equal keys imply equal interventions."""
        ...


@dataclasses.dataclass(eq=False)
class Task:
    """A prompt for which a lane generates a reply.

    Attributes:
      number: the prompt's index in the call of `generate` or in the `Stream`, or its request's
        index in the order of submission to `Engine`.
      row: the encoded prompt.
      row_id: uint32, the id that seeds the random draws.
      limit: the maximum number of tokens in the reply.
      sampling: the sampling settings, as arrays of one row.
      shape: the static sizes for the prefill.
      lane: the key of the lane.
      edits: the interventions on one row, for `RowEdits`; None for `SharedEdits`.
      cancelled: whether the request was cancelled or failed; the task is then removed.
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
      slots: the number of cache slots S.
      max_new: M, the number of tokens that `State.tokens` can hold.
      greedy: whether every temperature is 0.
      capture: the activations to capture.
      stops: the stop tokens, thinking tags and transition tables.
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


def piece_of(config: ModelConfig, like: jax.Array, edits: Interventions, rows: int) -> int | None:
    """Return the piece length in tokens for chunked prefill, or None if a prompt runs in one call.

    On a CPU, the time of a call is proportional to its number of tokens. A prompt therefore runs in
    pieces of `PIECE` tokens, so that prompts of all lengths share one program with little padding.
    On a GPU or TPU, calls with few tokens do not use the device fully, so a prompt runs in one
    call. It also runs in one call if the model is small (`pieces.large`), if a gate needs the whole
    prompt, on a mesh, and in a lane of at most `FEW_ROWS` rows, which needs few programs even
    without pieces (`prompts.padded`).

    Args:
      config: the model's configuration.
      like: an array on the device of the parameters.
      edits: interventions with the lane's structure.
      rows: the number of rows B of the lane.
    """
    if rows <= FEW_ROWS or needs_whole(edits) or not on_cpu(like) or not large(config):
        return None
    return PIECE


def shape_of(row: Row, max_new: int, share_prefix: bool, context: int, rows: int,
             piece: int | None = None) -> Shape:
    """Return the static sizes for the prefill of a prompt.

    Args:
      row: the encoded prompt.
      max_new: the maximum number of tokens in the reply.
      share_prefix: whether the shared prefix is prefilled separately.
      context: the model's context in tokens.
      rows: the number of rows B of the lane.
      piece: the number of tokens in a piece, or None (`piece_of`).
    """
    shared = prefix_length(row) if share_prefix else 0
    prefix = padded(shared, rows) if shared else 0
    if piece is not None:  # padding within a piece occupies no cache slots
        needed = max(prefix, row.tokens.size + max_new)
        return Shape(prefix, piece, cache_size(needed, context, least=_LEAST_SLOTS))
    width = padded(row.tokens.size - shared, rows)
    if rows > FEW_ROWS:
        return Shape(prefix, width, cache_size(prefix + width + max_new, context))
    needed = max(prefix + width, row.tokens.size + max_new)
    return Shape(prefix, width, cache_size(needed, context, least=256, finer=None))


def shape_within(row: Row, limit: int, sizes: Sequence[int],
                 piece: int | None = None) -> tuple[Shape, int]:
    """Return the static sizes for a prompt, with a cache of one of the given sizes.

    Args:
      row: the encoded prompt.
      limit: the maximum number of tokens in the reply.
      sizes: the cache sizes in slots, ascending.
      piece: the number of tokens in a piece, or None (`piece_of`).

    Returns:
      The static sizes for the prefill, and `limit`, reduced if necessary to fit the largest cache.

    Raises:
      UserError: the prompt leaves no room for a reply in the largest cache.
    """
    width = taken = bucket(row.tokens.size)
    if piece is not None:
        width, taken = piece, row.tokens.size
    if taken >= sizes[-1]:
        padding = f", padded to {taken}" if piece is None else ""
        raise UserError(f"the conversation has {row.tokens.size} tokens{padding}, but the engine's "
                        f"largest cache is limited to {sizes[-1]} tokens, including the reply; "
                        "shorten the conversation, or create the engine with larger sizes")
    limit = min(limit, sizes[-1] - taken)
    return Shape(0, width, next(x for x in sizes if x >= taken + limit)), limit


def cache_size(tokens: int, context: int, *, least: int = 64, finer: int | None = 512) -> int:
    """Return the number of cache slots for at most `tokens` tokens.

    By default, the result is the smallest of 64, 128, 256, 512, 768, 1,024, 1,536, 2,048, … that is
    at least `tokens`. If this size exceeds the context, the result is `tokens` rounded up to a
    multiple of 64. There are few sizes, so that prompts of different lengths share a lane. More
    sizes would mean more lanes with many free rows.

    Args:
      tokens: the number of tokens.
      context: the model's context in tokens.
      least, finer: the parameters of the list of sizes, as for `bucket`.
    """
    size = bucket(tokens, least=least, finer=finer)
    return size if size <= context else -(-tokens // 64) * 64


def prefix_length(row: Row) -> int:
    """Return the number of tokens before the first `USER` token; 0 if below `_SHORTEST_PREFIX`."""
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
    """Return a batch with tokens start…stop−1 of each prompt, padded with empty rows.

    Args:
      chosen: n ≤ `size` tasks; None stands for an empty row.
      start, stop: n token indices each.
      width: the number of tokens T per row of the batch.
      size: the number of rows B of the batch.
      chunk: whether each row contains only part of a prompt.
    """
    whole = [None if task is None else make_batch(
        [task.row.tokens], kind=[task.row.kind & ~LAST], turn=[task.row.turn],
        row_id=[task.row_id]) for task in chosen]
    return parts(whole, start, stop, width, size).replace(chunk=chunk)
