"""Extraction of activations from complete conversations.

Neither the logits nor the layers above the last captured or edited layer are computed. On a single
CPU device, conversations run in pieces, which are chunks of consecutive tokens, as in chunked
prefill (`engine.texts`), unless the model is small, a capture has one value per token, or a gate
needs the whole prompt. Otherwise, they run in batches of about the same number of tokens
(`engine.batches`).
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxpersona.brief import count, line
from jaxpersona.calls import checked_call
from jaxpersona.captures.capture import Capture, chosen_layers, joined, mean
from jaxpersona.captures.missing import FIX, describe_empty, no_token
from jaxpersona.distributed import processes
from jaxpersona.distributed.context import own_context
from jaxpersona.distributed.sharding import off_mesh, platform, rows_divisor
from jaxpersona.engine import prompts
from jaxpersona.engine.batches import batches, pad
from jaxpersona.engine.compiled import program
from jaxpersona.engine.nonfinite import NonfiniteWarning, OnNonfinite, check_choice, explain
from jaxpersona.engine.pieces import reset
from jaxpersona.engine.texts import PIECE, ROWS, fits_pieces, in_pieces
from jaxpersona.errors import UserError
from jaxpersona.export import Table, shapes
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.interventions.trace import Applied
from jaxpersona.interventions.where import WIDTH, holds
from jaxpersona.kernels.edit import Implementation as Fused
from jaxpersona.models.batch import Batch
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.forward import Output, forward
from jaxpersona.models.model import check_model
from jaxpersona.models.params import Params
from jaxpersona.progress import shows, tokens
from jaxpersona.runtime import debugging
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxtyping import Bool

    from jaxpersona.models.model import Model

_LOG = logging.getLogger("jaxpersona")
# target number of tokens per batch, by platform: large enough to use the device fully, but small
# enough to limit the padding of the last batch of each width
_TOKENS = {"cpu": 1024}
_TOKENS_ELSE = 16_384


@dataclasses.dataclass(frozen=True)
class Extracted(Table):
    """The captured activations of N conversations, in input order.

    Attributes:
      captured: the result of each reading by name: an array [N, L, …] for L layers; a list of N
        arrays [L, T, …] if there is one value for each of T tokens; or a pytree of arrays [N, …],
        such as `Moments`.
      applied: one `Applied` per intervention table; `seen` is [N], and `changed` is [l, N], where l
        is the number of layers of the table.
      rows: the encoded conversations.
      tokens: the total number of tokens.
      padded: the total number of token positions, including padding.
      nonfinite: [N] bool, True for conversations with NaN or infinite activations; discard the
        captured values of these conversations.

    Examples:
      >>> import jaxpersona as jp
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> jp.extract(jp.load("mini"), [talk])
      Extracted(1 conversation, 15 tokens, captured: mean)
    """

    captured: dict[str, Any]
    applied: tuple[Applied, ...]
    rows: list[chat.Row]
    tokens: int
    padded: int
    nonfinite: Bool[np.ndarray, " N"]

    def __repr__(self) -> str:
        return line("Extracted", count(len(self.rows), "conversation"),
                    count(self.tokens, "token"),
                    f"captured: {', '.join(self.captured)}")

    def records(self) -> list[dict[str, Any]]:
        """Return one record per conversation.

        The keys are `text` (the last message, or `Row.text` if there are no messages), `tokens`
        (the number of tokens) and `finite` (whether all activations were finite).
        """
        return [{"text": row.messages[-1]["content"] if row.messages else row.text,
                 "tokens": int(row.tokens.size), "finite": not bad}
                for row, bad in zip(self.rows, self.nonfinite.tolist(), strict=True)]

    def facts(self) -> dict[str, Any]:
        """Return the shapes of the captured arrays; the arrays themselves are not exported."""
        return shapes(self.captured)


@checked_call
@shows(tokens("extract"))
@own_context()
def extract(
    model: Model,
    conversations: Iterable[Any],
    *,
    capture: Capture | Sequence[Capture] | None = None,
    interventions: Interventions | None = None,
    batch_tokens: int | None = None,
    on_nonfinite: OnNonfinite = "warn",
    progress: Callable[[int, int, int], None] | bool | None = None,
    residual: Fused = "xla",
) -> Extracted:
    """Run the model on complete conversations and return captured activations.

    Args:
      model: the result of `load`.
      conversations: an iterable of N conversations, each a list of {"role", "content"}, a string
        (one user message), a `chat.Row`, or token ids.
      capture: a capture, or a list of captures; default: the mean over response tokens at every
        layer.
      interventions: edits of the activations, created without `rows=` or with one row per
        conversation.
      batch_tokens: the target number of tokens per forward pass, including padding; it affects the
        floating-point rounding of results. Default: 16,384 on a GPU or TPU; on a CPU, 128 if
        conversations run in pieces (`texts.fits_pieces`), otherwise 1,024.
      on_nonfinite: the response to NaN or infinite activations. "warn": mark the conversation
        (`Extracted.nonfinite`) and issue one `NonfiniteWarning` that names the first affected layer
        and a fix. "raise": raise a `UserError`. `jax_debug_nans` and `jax_debug_infs` imply
        "raise".
      progress: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called with three counts instead: finished conversations, all
        conversations, and token positions processed so far, including padding.
      residual: "xla", or "pallas" for one fused TPU kernel that applies the edits and computes the
        projections and the next norm (see `forward`).

    Returns:
      The captured activations, in input order. If a capture such as a mean selects no token in some
      conversations, its values there are NaN, and a logged warning lists these conversations.

    Raises:
      UserError: there are no conversations, a conversation is invalid or longer than the context, a
        capture such as a mean selects no token in any conversation, the capture or the
        interventions do not match the model or are not supported by `residual="pallas"`, another
        argument is invalid, or activations are not finite and `on_nonfinite` is "raise".

    Examples:
      >>> import jaxpersona as jp
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> found = jp.extract(jp.load("mini"), [talk], capture=jp.capture.mean(jp.response))
      >>> found.captured["mean"].shape
      (1, 8, 128)
    """
    check_model(model)
    check_choice(on_nonfinite)
    conversations = chat.listed(conversations)
    if batch_tokens is not None:
        prompts.check_settings(batch_tokens=batch_tokens)
    capture = mean() if capture is None else joined(capture)
    edits, readings = off_mesh((given(interventions), capture))
    prompts.check_edits(model, edits, len(conversations), readings)
    rows = [prompts.encode(model, item, reply=False, name=f"conversation {i}")
            for i, item in enumerate(conversations)]
    prompts.check_lengths(model, rows)
    _check_tokens(rows, readings)
    results: dict[int, tuple[dict[str, Any], tuple[Applied, ...]]] = {}
    padded, ragged = 0, set[str]()
    nonfinite = np.zeros(len(rows), bool)
    stop = on_nonfinite == "raise" or debugging()

    def explanation() -> str:
        i = int(np.argmax(nonfinite))
        return explain(model, rows[i], edits.take([i]), f"conversation {i}",
                       f"{int(nonfinite.sum())} of {len(rows)} conversations produced")

    def keep(members: Sequence[int], out: Output | Carry) -> None:
        """Store the results of rows; raise a `UserError` for non-finite activations if requested.

        Args:
          members: the index of each row's conversation, or −1 if the row has no result to store.
          out: the results of the rows.
        """
        captured, applied, finite = processes.fetch((out.captured, out.applied, out.finite))
        ragged.update(name for name, state in captured.items() if state.per_token)
        values = {name: state.result() for name, state in captured.items()}
        for b, i in enumerate(members):
            if i < 0:
                continue
            nonfinite[i] = not finite[b]
            length = rows[i].tokens.size
            values_of_row = {
                name: np.array(value[b][:, :length]) if name in ragged
                else jax.tree.map(lambda x, b=b: np.array(x[b]), value)
                for name, value in values.items()
            }
            counts = tuple(Applied(x.seen[b], x.changed[:, b]) for x in applied)
            results[int(i)] = values_of_row, counts
        if nonfinite.any() and stop:
            raise UserError(explanation())

    if residual == "xla" and fits_pieces(model, edits, readings):
        passes = _in_pieces(model, rows, edits, readings, batch_tokens)
    else:
        passes = _in_batches(model, rows, edits, readings, batch_tokens, residual)
    for members, out, ran in passes:
        padded += ran
        if out is not None:
            keep(members, out)
        if callable(progress):
            progress(len(results), len(rows), padded)
    if nonfinite.any():
        message = explanation()  # runs the model, so all processes must call it
        if processes.first():
            warnings.warn(message, NonfiniteWarning, stacklevel=5)
    order = [results[i] for i in range(len(rows))]
    captured = {
        name: [row_values[name] for row_values, _ in order] if name in ragged
        else jax.tree.map(lambda *x: np.stack(x), *(row_values[name] for row_values, _ in order))
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
    """Check that every capture that needs a token selects at least one in some conversation.

    If such a capture selects no token in some conversations, a logged warning lists them.

    Raises:
      UserError: a capture that needs a token, such as a mean, selects no token in any conversation.
    """
    for name, reading in capture.readings.items():
        if not reading.needs_token:
            continue
        code = np.asarray(reading.where).reshape(-1, WIDTH)
        empty = []
        for i, row in enumerate(rows):
            one = make_batch([row.tokens], kind=[row.kind], turn=[row.turn])
            if not np.asarray(holds(code[i % len(code)], one)).any():
                empty.append(i)
        if empty:
            told = (empty, len(rows), "conversation")
            if len(empty) == len(rows):
                raise UserError(f"capture {name!r} {no_token(*told)}; {FIX}, such as where=jp.user")
            _LOG.warning("capture %r %s", name, describe_empty(*told))


def _in_batches(model: Model, rows: list[chat.Row], edits: Interventions, capture: Capture,
                tokens: int | None, residual: Fused,
                ) -> Iterator[tuple[Sequence[int], Output | None, int]]:
    """Run conversations in batches.

    Yields:
      For each batch: the indices of its conversations, its result, and its number of token
      positions, including padding.
    """
    if tokens is None:
        tokens = _TOKENS.get(platform(model.params.like), _TOKENS_ELSE)
    running: tuple[list[int], Output, int] | None = None
    for members, width, size in batches(rows, tokens, rows_divisor(model.params.like)):
        batch = pad([rows[i] for i in members], width, size)
        index = np.array(members + [-1] * (size - len(members)), np.int32)
        out = _read(model.params, model.config, batch, edits.take(index), capture,
                    residual=residual)
        if running is not None:
            yield running  # the caller copies this result while the next batch runs
        running = members, out, width * size
    if running is not None:
        yield running


def _in_pieces(model: Model, rows: list[chat.Row], edits: Interventions, capture: Capture,
               tokens: int | None) -> Iterator[tuple[Sequence[int], Carry | None, int]]:
    """Run conversations in pieces: chunks of at most `PIECE` consecutive tokens.

    One call of the model processes the next piece of up to R conversations, one in each row.

    Yields:
      For each call of the model: R integers, the index of the conversation that ends in each row,
      or −1; the carry with the results, or None if no conversation ends in the call; and the number
      of token positions in the call, including padding and empty rows.
    """
    together = ROWS if tokens is None else max(1, tokens // PIECE)

    def run(carry: Carry, batch: Batch, edits: Interventions, begins: jax.Array,
            axes: tuple[int, ...], following: np.ndarray) -> tuple[Carry, None]:
        return _read_piece(model.params, model.config, carry, batch, edits, capture, begins,
                           axes=axes), None

    layers = [table.layers[-1] for table in edits.edits]
    layers += [chosen_layers(reading, model.config)[-1] for reading in capture.readings.values()]
    for step in in_pieces(model, rows, edits, capture, together=together,
                          layers=max(layers, default=-1) + 1, run=run):
        yield np.where(step.call.ends, step.members, -1).tolist(), step.ended, together * PIECE


@program(static=("config", "axes"), donate=("carry",), result=lambda carry, **_: carry)
def _read_piece(params: Params, config: ModelConfig, carry: Carry, batch: Batch,
                edits: Interventions, capture: Capture, begins: jax.Array, *,
                axes: tuple[int, ...]) -> Carry:
    """Run the next piece of each conversation; return the carry with updated capture states."""
    carry = reset(carry, begins, config, params, edits, capture, axes)
    return forward(params, config, batch, interventions=edits, capture=capture, carry=carry,
                   logits=None).carry


@program(static=("residual",))
def _read(params: Params, config: ModelConfig, batch: Batch, edits: Interventions,
          capture: Capture, *, residual: Fused) -> Output:
    """Run one batch and capture its activations."""
    batch = batch.spread(params.like)
    return forward(params, config, batch, interventions=edits, capture=capture, logits=None,
                   attention="auto", residual=residual)
