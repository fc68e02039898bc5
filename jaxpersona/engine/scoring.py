"""Log-probabilities of the tokens of a text, and of candidates for the next token.

On a single CPU device, texts run in pieces, which are chunks of consecutive tokens, as in chunked
prefill (`engine.texts`), unless the model is small or a gate needs the whole prompt. Otherwise,
they run in batches (`engine.batches`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import count, line, shown
from jaxpersona.calls import checked_call
from jaxpersona.captures.capture import Capture
from jaxpersona.distributed import processes
from jaxpersona.distributed.context import own_context
from jaxpersona.distributed.sharding import off_mesh, platform, rows_divisor
from jaxpersona.engine import prompts
from jaxpersona.engine.batches import batches, pad
from jaxpersona.engine.compiled import program
from jaxpersona.engine.nonfinite import explain
from jaxpersona.engine.pieces import reset
from jaxpersona.engine.texts import PIECE, ROWS, fits_pieces, in_pieces
from jaxpersona.errors import UserError
from jaxpersona.export import Table
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.interventions.where import Where, encoded, everywhere, holds
from jaxpersona.models.batch import Batch, check_ids
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.forward import forward
from jaxpersona.models.model import check_model
from jaxpersona.models.params import Params
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    from jaxpersona.models.model import Model

# tokens per batch, by platform; on a GPU or TPU, fewer than in `extract`, because the float32
# logits [tokens, vocabulary] of the whole batch must fit in memory
_TOKENS = {"cpu": 1024}
_TOKENS_ELSE = 4096


@dataclasses.dataclass(frozen=True)
class Scored(Table):
    """The log-probabilities of N texts, in input order.

    Attributes:
      rows: the encoded texts.
      logprobs: N arrays [T−1] float32; entry t is log p(token t+1 | tokens 0…t), in nats.

    Examples:
      >>> import jaxpersona as jp
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> scored = jp.logprobs(jp.load("mini"), [talk])
      >>> len(scored.logprobs[0]) == len(scored.rows[0].tokens) - 1
      True
    """

    rows: list[chat.Row]
    logprobs: list[np.ndarray]

    def __repr__(self) -> str:
        return line("Scored", count(len(self.rows), "text"),
                    count(sum(row.tokens.size for row in self.rows), "token"))

    def records(self) -> list[dict[str, Any]]:
        """Return one record per text.

        The keys are `text` (the last message, or `Row.text` if there are no messages), `tokens`
        (the number of tokens), `logprob` (the mean log-probability in nats), `perplexity`, `ids`
        (the token ids), and `logprobs` (one value per token after the first). For a text of one
        token, `logprob` and `perplexity` are NaN.
        """
        found = []
        for row, values in zip(self.rows, self.logprobs, strict=True):
            mean = float(values.mean(dtype=np.float64)) if values.size else float("nan")
            found.append({"text": row.messages[-1]["content"] if row.messages else row.text,
                          "tokens": int(row.tokens.size), "logprob": mean,
                          "perplexity": float(np.exp(-mean)), "ids": row.tokens.tolist(),
                          "logprobs": values.tolist()})
        return found

    def _left_out(self, column: str) -> bool:
        return column in ("ids", "logprobs")

    def chosen(self, where: Where | str = everywhere) -> list[np.ndarray]:
        """Return the log-probabilities in nats of the selected tokens: one array [n] per text.

        The first token of a text has no log-probability and is omitted.
        """
        code = jnp.asarray(encoded(where))
        selected = []
        for row, values in zip(self.rows, self.logprobs, strict=True):
            one = make_batch([row.tokens], kind=[row.kind], turn=[row.turn])
            selected.append(values[np.asarray(holds(code, one))[0, 1 : row.tokens.size]])
        return selected

    def perplexity(self, where: Where | str = everywhere) -> float:
        """Return exp(−mean log p) over the tokens that `where` selects in all texts.

        Raises:
          UserError: no token after the first is selected in any text.
        """
        values = np.concatenate(self.chosen(where))
        if not values.size:
            raise UserError(f"where={where!r} selects no token after the first in any text; select "
                            "other tokens (the first token of a text has no log-probability)")
        return float(np.exp(-values.mean(dtype=np.float64)))


@checked_call
@own_context()
def logprobs(
    model: Model,
    conversations: Iterable[Any],
    *,
    interventions: Interventions | None = None,
    batch_tokens: int | None = None,
) -> Scored:
    """Return the log-probability of every token after the first in complete texts.

    Args:
      model: the result of `load`.
      conversations: N conversations, each a list of messages, a string (one user message), a
        `chat.Row`, or token ids (for plain text, use `model.tokenizer(text).input_ids`).
      interventions: edits of the activations, created without `rows=` or with one row per
        conversation.
      batch_tokens: the target number of tokens per forward pass, including padding; it affects the
        floating-point rounding of results. Default: 4,096 on a GPU or TPU; on a CPU, 128 if texts
        run in pieces (`texts.fits_pieces`), otherwise 1,024.

    Raises:
      UserError: there are no conversations, a conversation is invalid or longer than the context,
        the interventions do not match the model or the number of conversations, `batch_tokens` is
        not a positive integer, or activations are not finite.

    Examples:
      >>> import jaxpersona as jp
      >>> model = jp.load("mini")
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> jp.logprobs(model, [talk]).perplexity(jp.response) > 1
      True
    """
    check_model(model)
    conversations = chat.listed(conversations)
    rows = [prompts.encode(model, item, reply=False, name=f"conversation {i}")
            for i, item in enumerate(conversations)]
    values = _run(model, rows, interventions, batch_tokens)
    return Scored(rows, [value[: row.tokens.size - 1]
                         for row, value in zip(rows, values, strict=True)])


@checked_call
@own_context()
def next_logprobs(
    model: Model,
    conversations: Iterable[Any],
    candidates: Sequence[int],
    *,
    interventions: Interventions | None = None,
    batch_tokens: int | None = None,
) -> np.ndarray:
    """Return the log-probabilities of candidate tokens as the first token of the reply.

    Args:
      model: the result of `load`.
      conversations: N prompts, each a list of messages, a string (one user message), a `chat.Row`,
        or token ids.
      candidates: C token ids.
      interventions: edits of the activations, created without `rows=` or with one row per
        conversation.
      batch_tokens: the target number of tokens per forward pass, including padding; it affects the
        floating-point rounding of results. Default: 4,096 on a GPU or TPU; on a CPU, 128 if texts
        run in pieces (`texts.fits_pieces`), otherwise 1,024.

    Returns:
      [N, C] float32, the log-probabilities in nats.

    Raises:
      UserError: there are no prompts or candidates, a candidate is not an integer or is outside the
        vocabulary, a prompt is invalid or fills the context, the interventions do not match the
        model or the number of prompts, `batch_tokens` is not a positive integer, or activations are
        not finite.

    Examples:
      >>> import jaxpersona as jp
      >>> model = jp.load("mini")
      >>> ids = model.tokenizer.convert_tokens_to_ids(["I", "A"])
      >>> jp.next_logprobs(model, ["Who are you?"], ids).shape
      (1, 2)
    """
    check_model(model)
    conversations = chat.listed(conversations)
    wanted = np.asarray(candidates if isinstance(candidates, np.ndarray) or
                        not isinstance(candidates, Iterable) else list(candidates))
    if wanted.ndim != 1 or not wanted.size or not np.issubdtype(wanted.dtype, np.integer):
        raise UserError(f"candidates is {shown(candidates, 60)}; give a non-empty list of token "
                        "ids")
    check_ids(wanted, model.config.vocab_size, "candidates", model.tokenizer)
    rows = [prompts.encode(model, item, name=f"conversation {i}")
            for i, item in enumerate(conversations)]
    prompts.limits(model, rows, 1)
    values = _run(model, rows, interventions, batch_tokens, jnp.asarray(wanted, jnp.int32))
    return np.stack(values)


def _run(model: Model, rows: list[chat.Row], interventions: Interventions | None,
         batch_tokens: int | None, candidates: jax.Array | None = None) -> list[np.ndarray]:
    """Return the log-probabilities of each text's own tokens or of candidate next tokens.

    Args:
      model: the model.
      rows: N encoded texts.
      interventions: interventions created without `rows=` or with N rows, or None.
      batch_tokens: the target number of tokens per forward pass; None: the default.
      candidates: [C] int32, the ids of candidates for the next token; None: score the texts' own
        tokens after the first.

    Returns:
      N float32 arrays in nats: [C] with candidates; otherwise, the first T−1 values of the array of
      a text of T tokens are its log-probabilities, and any further values are padding.

    Raises:
      UserError: an argument is invalid, or activations are not finite.
    """
    if batch_tokens is not None:
        prompts.check_settings(batch_tokens=batch_tokens)
    edits = off_mesh(given(interventions))
    prompts.check_edits(model, edits, len(rows))
    prompts.check_lengths(model, rows)
    run = _in_pieces if fits_pieces(model, edits, Capture()) else _in_batches
    scores: dict[int, np.ndarray] = {}
    for members, values, finite in run(model, rows, edits, batch_tokens, candidates):
        for i, value, valid in zip(members, values, finite, strict=False):  # omit padding rows
            if not valid:
                raise UserError(explain(model, rows[i], edits.take([i]), f"conversation {i}",
                                        "the log-probabilities are undefined because of"))
            scores[i] = np.asarray(value)
    return [scores[i] for i in range(len(rows))]


Found = tuple[Sequence[int], Sequence[np.ndarray], Sequence[bool] | np.ndarray]


def _in_batches(model: Model, rows: list[chat.Row], edits: Interventions, tokens: int | None,
                candidates: jax.Array | None) -> Iterator[Found]:
    """Score texts in batches.

    Yields:
      For each batch: the indices of its n texts; log-probabilities, [B, W−1] or [B, C]; and [B]
      bool, whether a row's activations are finite. The n texts are the first n of the B rows.
    """
    like = model.params.like
    tokens = _TOKENS.get(platform(like), _TOKENS_ELSE) if tokens is None else tokens
    for members, width, size in batches(rows, tokens, rows_divisor(like)):
        index = np.array(members + [-1] * (size - len(members)), np.int32)
        batch = pad([rows[i] for i in members], width, size)
        first = model.params, model.config, batch, edits.take(index)
        made = _of_tokens(*first) if candidates is None else _of_candidates(*first, candidates)
        yield (members, *processes.fetch(made))


def _in_pieces(model: Model, rows: list[chat.Row], edits: Interventions, tokens: int | None,
               candidates: jax.Array | None) -> Iterator[Found]:
    """Score texts in pieces.

    Yields:
      For each call in which texts end: the indices of these n texts; n arrays of log-probabilities,
      [T−1] for a text of T tokens or [C]; and [n] bool, whether a text's activations are finite.
    """
    together = ROWS if tokens is None else max(1, tokens // PIECE)
    parts: dict[int, list[np.ndarray]] = {}

    def run(carry: Carry, batch: Batch, edits: Interventions, begins: jax.Array,
            axes: tuple[int, ...], following: np.ndarray) -> tuple[Carry, jax.Array]:
        return _score_piece(model.params, model.config, carry, batch, edits, begins, following,
                            candidates, axes=axes)

    for step in in_pieces(model, rows, edits, Capture(), together=together,
                          layers=model.config.n_layers, run=run):
        call = step.call
        if candidates is None:
            values = processes.fetch(step.output)
            for i, value, low, high in zip(step.members, values, call.start, call.stop,
                                           strict=True):
                if i >= 0:
                    parts.setdefault(int(i), []).append(value[: high - low])
        if step.ended is None:
            continue
        done = np.flatnonzero(call.ends)
        ended = [int(i) for i in step.members[done]]
        if candidates is None:  # the last token has no next token
            found = [np.concatenate(parts.pop(i))[:-1] for i in ended]
        else:
            found = list(processes.fetch(step.output)[done])
        assert step.ended.finite is not None
        yield ended, found, np.asarray(step.ended.finite)[done]


def _logprob(logits: Float[Array, "*B V"],
             tokens: Int[Array | np.ndarray, "*B"]) -> Float[Array, "*B"]:
    """Return log softmax(logits) at one token per row.

    A masked sum replaces the gather of the token's logit, because the vocabulary may be sharded.
    """
    return _logit(logits, tokens[..., None]) - jax.nn.logsumexp(logits, axis=-1)


def _logit(logits: Float[Array, "*B V"], token: Any) -> Float[Array, "*B"]:
    """Return the logits [*B] of tokens; `token` must broadcast against `logits`."""
    here = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == token
    return jnp.where(here, logits, 0).sum(-1)


@program()
def _of_tokens(params: Params, config: ModelConfig, batch: Batch, edits: Interventions,
               ) -> tuple[Float[Array, "B T-1"], Bool[Array, " B"]]:
    """Return log p of each row's tokens after the first, and `Output.finite`."""
    batch = batch.spread(params.like)
    out = forward(params, config, batch, interventions=edits, attention="auto")
    return _logprob(out.logits[:, :-1], batch.tokens[:, 1:]), out.finite


@program()
def _of_candidates(params: Params, config: ModelConfig, batch: Batch, edits: Interventions,
                   candidates: Int[Array, " C"],
                   ) -> tuple[Float[Array, "B C"], Bool[Array, " B"]]:
    """Return log p of each candidate as the next token of each row, and `Output.finite`."""
    batch = batch.spread(params.like)
    out = forward(params, config, batch, interventions=edits, logits="last", attention="auto")
    values = jax.lax.map(lambda token: _logit(out.logits, token), candidates)  # [C, B]
    return values.T - jax.nn.logsumexp(out.logits, axis=-1)[:, None], out.finite


@program(static=("config", "axes"), donate=("carry",),
         result=lambda carry, begins, **_: (carry, begins))
def _score_piece(params: Params, config: ModelConfig, carry: Carry, batch: Batch,
                 edits: Interventions, begins: jax.Array, following: jax.Array | np.ndarray,
                 candidates: Int[Array, " C"] | None, *, axes: tuple[int, ...],
                 ) -> tuple[Carry, jax.Array]:
    """Run the next piece of each text and compute log-probabilities.

    Returns:
      The new carry, and log-probabilities. Without candidates, these are the log-probabilities
      [B, W] of `following` [B, W], the token that follows each token of the batch. With candidates,
      these are the log-probabilities [B, C] of each candidate after the last token of each row.
    """
    carry = reset(carry, begins, config, params, edits, Capture(), axes)
    out = forward(params, config, batch, interventions=edits, capture=Capture(), carry=carry,
                  logits="all" if candidates is None else "last")
    if candidates is None:
        return out.carry, _logprob(out.logits, following)
    values = jax.lax.map(lambda token: _logit(out.logits, token), candidates)  # [C, B]
    return out.carry, values.T - jax.nn.logsumexp(out.logits, axis=-1)[:, None]
