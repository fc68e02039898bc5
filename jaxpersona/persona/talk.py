"""Project the replies of existing or newly generated conversations, to measure persona drift."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import brief, shown
from jaxpersona.captures import capture
from jaxpersona.distributed.context import own_context
from jaxpersona.engine.batches import width_of
from jaxpersona.engine.extract import extract
from jaxpersona.engine.generate import generate
from jaxpersona.engine.prompts import encode
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.where import holds, response
from jaxpersona.models.batch import batch
from jaxpersona.persona.check import fit
from jaxpersona.progress import shows
from jaxpersona.text import chat
from jaxpersona.vectors.vector import Vector

if TYPE_CHECKING:
    from jaxpersona.models.model import Model


@dataclasses.dataclass(frozen=True)
class TurnProjection:
    """The mean projections of one assistant message.

    Attributes:
      turn: the index of the message in the conversation, from 0.
      tokens: the number of response tokens.
      values: [L, K] float32, the mean projections of the response tokens onto K directions at L
        layers; NaN at layers where any direction is zero, which is possible in imported files.
    """

    __repr__ = brief

    turn: int
    tokens: int
    values: np.ndarray


@own_context()
def project_conversation(
    model: Model,
    conversation: Sequence[dict[str, str]],
    vectors: Sequence[Vector],
    *,
    interventions: Interventions | None = None,
) -> list[TurnProjection]:
    """Project the assistant messages of a finished conversation onto directions.

    Each value is the mean of ⟨h, v̂⟩ over the response tokens of one message, as in the drift
    measurements of Lu et al. 2026. h is the residual stream after the interventions at a layer, and
    v̂ a direction, normalized at this layer.

    Args:
      model: the model.
      conversation: a list of {"role", "content"}.
      vectors: K directions in the residual stream.
      interventions: the interventions in the forward pass, or None.

    Returns:
      One `TurnProjection` per assistant message with response tokens.

    Raises:
      UserError: `vectors` is empty or a single `Vector`, the model has no tokenizer, the
        conversation has no response tokens or exceeds the context, activations are not finite, a
        direction or intervention belongs to another model or site, or there is no layer at which
        all directions are nonzero.
    """
    if isinstance(vectors, Vector) or not vectors:
        raise UserError(f"vectors is {shown(vectors)}; give a list of at least one direction")
    vectors = [fit(model, vector) for vector in vectors]
    if model.tokenizer is None:
        raise UserError(f"{model.name} has no tokenizer; conversations need one")
    row = encode(model, conversation, reply=False)
    (found,) = _project(model, [row], vectors, interventions=interventions,
                        batch_tokens=width_of(row.tokens.size))  # a batch without padding rows
    if not found:
        raise UserError("the conversation has no assistant message with response tokens; add a "
                        "reply with content")
    return found


def _project(model: Model, rows: Sequence[chat.Row], vectors: Sequence[Vector],
             **settings: Any) -> list[list[TurnProjection]]:
    """Project the assistant messages of encoded conversations onto directions.

    The remaining keyword arguments are passed to `extract`.

    Returns:
      For each conversation, one `TurnProjection` per assistant message with response tokens.

    Raises:
      UserError: there is no layer at which all directions are nonzero.
    """
    directions = np.stack([vector.values for vector in vectors], 1)
    known = [i for i, layer in enumerate(directions) if layer.any(1).all()]
    if not known:
        raise UserError("there is no layer at which all directions are nonzero; choose other "
                        "directions")
    read = extract(model, rows, on_nonfinite="raise", capture=capture.projections(
        directions[known], response, layers=known), **settings)
    every = []
    for row, projected in zip(rows, read.captured["projections"], strict=True):
        values = np.full((model.config.n_layers, *projected.shape[1:]), np.nan, np.float32)
        values[known] = projected  # [L, T, K]
        chosen = np.asarray(holds(jnp.asarray(response.encode()), batch(
            [row.tokens], kind=[row.kind], turn=[row.turn])))[0, : row.tokens.size]
        found = []
        for turn in sorted(set(row.turn[chosen].tolist())):
            here = chosen & (row.turn == turn)
            found.append(TurnProjection(turn, int(here.sum()), values[:, here].mean(1)))
        every.append(found)
    return every


@dataclasses.dataclass(frozen=True)
class Talks:
    """N generated conversations of M turns.

    Attributes:
      replies: M lists of N replies.
      projections: [M, N, L] float32, the mean projection of each reply during generation, computed
        after the interventions at each layer; NaN for a reply without response tokens, and at
        layers where the direction is zero. If a cap on this direction edits all response tokens,
        these projections are never below its floor, so they do not measure drift.
      readout: [M, N, L] float32, the mean projection of each reply in a forward pass over the
        finished conversation without interventions; None if not requested.
    """

    __repr__ = brief

    replies: list[list[str]]
    projections: np.ndarray
    readout: np.ndarray | None = None

    def arm(self, start: int, stop: int) -> Talks:
        """Return the conversations n with start ≤ n < stop, such as one arm of an experiment."""
        return Talks([replies[start:stop] for replies in self.replies],
                     self.projections[:, start:stop],
                     None if self.readout is None else self.readout[:, start:stop])


@shows(lambda turn, done, tokens: ("turn", 0, 0, f"turn {turn}, replies: {done}"), "report")
def grow(
    model: Model,
    openings: Sequence[Sequence[dict[str, str]]],
    messages: Sequence[Sequence[str]],
    vector: Vector,
    *,
    interventions: Interventions | None = None,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    readout: bool = False,
    report: Callable[[int, int, int], None] | bool | None = None,
    **settings: Any,
) -> Talks:
    """Generate multi-turn conversations with scripted user messages and project every reply.

    The prompt of each turn contains the generated token ids of the earlier replies, not the ids
    from encoding their texts again.

    Args:
      model: the model.
      openings: N lists with at most one system message each.
      messages: N lists of M user messages each.
      vector: the direction onto which the replies are projected.
      interventions: the interventions during generation, or None.
      seed, settings: as for `generate`; each turn uses different random draws.
      ids: N ids that determine the random draws; default: the index of each conversation.
        Conversations with equal ids use the same random draws.
      readout: whether to compute `Talks.readout`.
      report: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called instead with (index of the turn from 0, number of replies
        finished in this turn, number of tokens generated in this turn).

    Returns:
      The replies and their projections.

    Raises:
      UserError: as for `generate`; or `vector` belongs to another model or site, or is zero at
        every layer; or `openings` and `messages` do not match.
    """
    vector = fit(model, vector)
    openings, messages = _lists("openings", openings), _lists("messages", messages)
    counts = sorted({len(texts) for texts in messages})
    if len(openings) != len(messages) or len(counts) > 1 or not all(messages):
        numbers = ", ".join(map(str, counts))
        raise UserError(f"openings has {len(openings)} entries, and messages has {len(messages)} "
                        f"lists of {numbers} messages; give one opening and the same number of "
                        "messages, at least one, for each conversation")
    prompts: list[Any] = [
        [*opening, {"role": "user", "content": texts[0]}]
        for opening, texts in zip(openings, messages, strict=True)
    ]
    replies, values, rows = [], [], []
    known = np.flatnonzero(vector.values.any(1)).tolist()
    if not known:
        raise UserError(f"{vector.name!r} is zero at every layer; choose another direction")
    names = range(len(prompts)) if ids is None else ids
    for turn in range(len(messages[0])):
        out = generate(model, prompts, interventions=interventions, seed=seed,
                       ids=[chat.row_id([], i, f"talk/{turn}") for i in names],
                       capture=capture.projections(vector, response, layers=known),
                       on_nonfinite="raise",
                       progress=_at_turn(report, turn), **settings)
        replies.append(out.text)
        rows = list(zip(out.rows, out.tokens, strict=True))
        found = np.full((len(prompts), vector.n_layers), np.nan, np.float32)
        # use only the tokens after the prompt, because the prompt contains earlier replies
        for n, (row, read) in enumerate(zip(out.rows, out.captured["projections"], strict=True)):
            reply = read[:, row.tokens.size :, 0]  # NaN for tokens of thinking blocks
            if (chosen := np.isfinite(reply).all(0)).any():
                found[n, known] = reply[:, chosen].mean(1)
        values.append(found)
        if turn + 1 < len(messages[0]):
            prompts = [
                chat.continue_row(model.tokenizer, row, reply, texts[turn + 1], stopped=bool(stop))
                for row, reply, stop, texts in zip(out.rows, out.tokens, out.stopped, messages,
                                                   strict=True)
            ]
    again = None
    if readout:
        talks = [chat.answered(model.tokenizer, row, reply) for row, reply in rows]
        again = _read_back(model, talks, vector, np.stack(values).shape)
    return Talks(replies, np.stack(values), again)


def _read_back(model: Model, rows: Sequence[chat.Row], vector: Vector,
               shape: tuple[int, ...]) -> np.ndarray:
    """Project finished conversations without interventions; return the projections [M, N, L]."""
    values = np.full(shape, np.nan, np.float32)
    for n, found in enumerate(_project(model, rows, [vector])):
        last = int(rows[n].turn[-1])  # index of the last reply; replies are two messages apart
        for one in found:
            values[shape[0] - 1 - (last - one.turn) // 2, n] = one.values[:, 0]
    return values


def _lists(name: str, given: Any) -> list[list[Any]]:
    """Convert an argument of `grow` to a list that contains one list per conversation.

    Raises:
      UserError: the argument is empty, or an entry is not a list.
    """
    entries = chat.listed(given, name)
    for i, one in enumerate(entries):
        if isinstance(one, (str, bytes)) or not isinstance(one, Iterable):
            raise UserError(f"{name}[{i}] is {shown(one, 60)}; give one list per conversation")
    return [list(one) for one in entries]


def _at_turn(report: Callable[[int, int, int], None] | bool | None,
             turn: int) -> Callable[[int, int, int], None] | None:
    if not callable(report):
        return None
    return lambda done, total, tokens: report(turn, done, tokens)
