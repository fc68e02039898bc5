"""Read activations of finished conversations: no head, no layer above the highest that is read.

Conversations are sorted by length, and every batch has about the same number of tokens, so short
ones go many at a time. A conversation's width is a function of its length and its number of rows a
function of its width: its bits do not depend on which others are read with it.
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

from jaxpersona.captures.capture import Capture, mean
from jaxpersona.captures.missing import describe_empty
from jaxpersona.distributed import processes
from jaxpersona.distributed.context import own_context
from jaxpersona.distributed.sharding import off_mesh, platform, rows_divisor
from jaxpersona.engine import prompts
from jaxpersona.engine.compiled import program
from jaxpersona.engine.nonfinite import NonfiniteWarning, OnNonfinite, check_choice, explain
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.interventions.trace import Applied
from jaxpersona.interventions.where import WIDTH, holds
from jaxpersona.models.batch import Batch
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.forward import Output, forward
from jaxpersona.models.params import Params
from jaxpersona.runtime import debugging
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

_LOG = logging.getLogger("jaxpersona")
# tokens of a batch: enough to keep the device busy, few enough that last batches are not empty
_TOKENS = {"cpu": 1024}
_TOKENS_ELSE = 16_384


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What was read off N conversations, in their order.

    Attributes:
      captured: each reading by its name: [N, L, …], or for readings a token a list of N arrays
        [L, T, …].
      applied: one `Applied` for each table of the interventions: seen [N], changed [l, N].
      rows: the conversations as they were encoded.
      tokens, padded: the tokens that were run, without and with padding.
      nonfinite: [N] bool, conversations in which a residual was NaN or infinite; what was read of
        them is not to be used.
    """

    captured: dict[str, Any]
    applied: tuple[Applied, ...]
    rows: list[chat.Row]
    tokens: int
    padded: int
    nonfinite: np.ndarray


@own_context()
def extract(
    model: Model,
    conversations: Iterable[Any],
    *,
    capture: Capture | None = None,
    interventions: Interventions | None = None,
    batch_tokens: int | None = None,
    on_nonfinite: OnNonfinite = "warn",
    progress: Callable[[int, int, int], None] | None = None,
) -> Extracted:
    """Read activations of conversations in as few passes as their lengths allow.

    Args:
      model: what `load` returned.
      conversations: an iterable of conversations, each a list of {"role", "content"}, a string (one
        user message), a `chat.Row`, or token ids.
      capture: what to read; default: the mean over response tokens at every layer.
      interventions: for all alike, or with one row a conversation.
      batch_tokens: the tokens of a batch, padding included; default: 1,024 for a model on a CPU,
        else 16,384.
      on_nonfinite: what to do where a conversation's activations are NaN or infinite. "warn":
        mark it (`Extracted.nonfinite`) and give one `NonfiniteWarning` with the first layer and
        what helps; "raise": stop with that as an error. With `jax_debug_nans` or `jax_debug_infs`
        it is "raise".
      progress: called with (conversations done, N, tokens so far).

    Raises:
      UserError: no conversation, one longer than the context, a reading (a mean, say) that would
        find no token in any of them, arguments that do not fit, or activations that are not finite
        and `on_nonfinite="raise"`. Where some conversations alone have no such token, their values
        are NaN and the log names them.
    """
    check_choice(on_nonfinite)
    conversations = chat.listed(conversations)
    if batch_tokens is None:
        batch_tokens = _TOKENS.get(platform(model.params.embed_vd), _TOKENS_ELSE)
    prompts.check_settings(capture, batch_tokens=batch_tokens)
    capture = mean() if capture is None else capture
    edits, capture = off_mesh((given(interventions), capture))
    prompts.check_edits(model, edits, len(conversations), capture)
    rows = [prompts.encode(model, item, reply=False) for item in conversations]
    for i, row in enumerate(rows):
        if row.tokens.size > model.config.max_context:
            raise UserError(f"conversation {i} has {row.tokens.size} tokens; the model's context "
                             f"holds {model.config.max_context}: shorten it")
    _check_tokens(rows, capture)
    found: dict[int, tuple[dict[str, Any], tuple[Applied, ...]]] = {}
    done = padded = 0
    nonfinite = np.zeros(len(rows), bool)
    stop = on_nonfinite == "raise" or debugging()

    def explained() -> str:
        i = int(np.argmax(nonfinite))
        return explain(model, rows[i], edits.take([i]), f"conversation {i}",
                       f"{int(nonfinite.sum())} of {len(rows)} conversations ran into")

    def keep(members: list[int], out: Output) -> None:
        captured, applied, finite = processes.fetch((out.captured, out.applied, out.finite))
        values = {name: state.result() for name, state in captured.items()}
        nonfinite[members] = ~finite[: len(members)]
        if nonfinite.any() and stop:
            raise UserError(explained())
        for b, i in enumerate(members):
            length = rows[i].tokens.size
            mine = {
                name: np.array(value[b][:, :length]) if captured[name].per_token
                else jax.tree.map(lambda x, b=b: np.array(x[b]), value)
                for name, value in values.items()
            }
            counts = tuple(Applied(x.seen[b], x.changed[:, b]) for x in applied)
            found[i] = mine, counts

    running: tuple[list[int], Output] | None = None
    ways = rows_divisor(model.params.embed_vd)
    for members, width, size in _batches(rows, batch_tokens, ways):
        batch = _pad([rows[i] for i in members], width, size)
        index = np.array(members + [-1] * (size - len(members)), np.int32)
        out = _read(model.params, model.config, batch, edits.take(index), capture)
        if running is not None:
            keep(*running)  # while the device is at the next batch
        running = members, out
        done, padded = done + len(members), padded + width * size
        if progress is not None:
            progress(done, len(rows), padded)
    if running is not None:
        keep(*running)
    if nonfinite.any():
        said = explained()  # by all processes together
        if processes.first():
            warnings.warn(said, NonfiniteWarning, stacklevel=3)
    order = [found[i] for i in range(len(rows))]
    ragged = {name for name, state in (running[1].captured if running else {}).items()
              if state.per_token}
    captured = {
        name: [mine[name] for mine, _ in order] if name in ragged
        else jax.tree.map(lambda *x: np.stack(x), *(mine[name] for mine, _ in order))
        for name in order[0][0]
    }
    applied = tuple(
        Applied(np.stack([c[n].seen for _, c in order]),
                np.stack([c[n].changed for _, c in order], -1))
        for n in range(len(edits.edits))
    )
    return Extracted(captured, applied, rows, sum(row.tokens.size for row in rows), padded,
                     nonfinite)


def _check_tokens(rows: list[chat.Row], capture: Capture) -> None:
    """Look for readings that will find no token, before anything is run.

    Raises:
      UserError: a mean, a last activation or moments over no token of any conversation.
    """
    for name, part in capture.readings.items():
        if not part.needs_token:
            continue
        code = np.asarray(part.where).reshape(-1, WIDTH)
        empty = []
        for i, row in enumerate(rows):
            one = make_batch([row.tokens], kind=[row.kind], turn=[row.turn])
            if not np.asarray(holds(code[i % len(code)], one)).any():
                empty.append(i)
        if empty:
            said = f"capture {name!r} {describe_empty(empty, len(rows), 'conversation')}"
            if len(empty) == len(rows):
                raise UserError(said)
            _LOG.warning("%s", said)


@program()
def _read(params: Params, config: ModelConfig, batch: Batch, edits: Interventions,
          capture: Capture) -> Output:
    batch = batch.spread(params.embed_vd)
    return forward(params, config, batch, interventions=edits, capture=capture, logits=None,
                   attention="auto")


def width_of(tokens: int) -> int:
    """Return the padded length of a conversation: the next multiple of 32, or of an eighth of the
    power of two below it where that is more."""
    step = max(32, (1 << (tokens - 1).bit_length()) // 16)
    return -(-tokens // step) * step


def _batches(rows: list[chat.Row], tokens: int,
             ways: int) -> list[tuple[list[int], int, int]]:
    """Cut the conversations, sorted by length, into (members, width, rows of the batch)."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(width_of(row.tokens.size), []).append(i)
    out = []
    for width, members in sorted(groups.items(), reverse=True):  # what needs most memory first
        size = max(1, tokens // (width * ways)) * ways  # a mesh spreads rows evenly
        out += [(members[at : at + size], width, size) for at in range(0, len(members), size)]
    return out


def _pad(rows: list[chat.Row], width: int, size: int) -> Batch:
    real = make_batch([r.tokens for r in rows], kind=[r.kind for r in rows],
                      turn=[r.turn for r in rows], width=width)
    extra = size - len(rows)
    return jax.tree.map(
        lambda x: jnp.asarray(np.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))), real)
