"""A conversation with a model: streamed replies, projections, and replies without interventions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxpersona.brief import brief, count, line, quoted
from jaxpersona.engine import prompts
from jaxpersona.engine.engine import Engine
from jaxpersona.engine.nonfinite import explain
from jaxpersona.engine.replies import Reply
from jaxpersona.engine.request import Handle, Request
from jaxpersona.engine.sampling import sampling
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.interventions.where import FOREVER
from jaxpersona.persona.monitor import NAME, EditCount, Monitor, edit_counts
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

_ROWS = 2  # number of batch rows of the engine: the two replies of a comparison share a batch
CHUNK = 4  # number of decode steps per streamed piece, after which a reply can be cancelled


class ContextFull(UserError):
    """Raised if a conversation leaves no room for a reply in the model's context."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """A user message and the reply to it.

    Attributes:
      message: the user message.
      reply: the reply.
      finish: the reason why the reply ended: "stop" (a stop token) or "length" (`max_new_tokens`
        tokens, or the end of the context); "" if unknown.
      tokens: the number of tokens in the reply.
      context: the number of tokens in the conversation, including the reply.
      edited: whether the interventions were applied.
      projections: layer → mean projection of the reply (`Monitor`); {} without a monitor, or if
        all tokens of the reply are excluded from projection.
      edits: the `EditCount` of each intervention; [] if the interventions were off.
    """

    __repr__ = brief

    message: str
    reply: str
    finish: str = ""
    tokens: int = 0
    context: int = 0
    edited: bool = False
    projections: dict[int, float] = dataclasses.field(default_factory=dict)
    edits: list[EditCount] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a streamed reply.

    Attributes:
      text: the new text. The concatenated texts of all pieces are the reply.
      projections: layer → mean projection of the reply up to and including this piece; {} without a
        monitor, or if all tokens so far are excluded from projection.
      turn: the complete turn, in the last piece only. A cancelled reply has no last piece.
    """

    text: str
    projections: dict[int, float]
    turn: Turn | None = None


def check_finite(model: Model, reply: Reply, edits: Interventions) -> None:
    """Check that the activations of a reply were finite.

    Args:
      model: the model.
      reply: the reply.
      edits: the interventions that were applied to the reply.

    Raises:
      UserError: an activation was NaN or infinite; the message contains the first affected site,
        the probable cause and a fix.
    """
    if reply.finish == "nonfinite":
        row = chat.answered(model.tokenizer, reply.row, reply.tokens)
        raise UserError(explain(model, row, edits, "this conversation", "the reply ended at"))


def _never() -> bool:
    return False


class Session:
    """A multi-turn conversation with a model, with or without interventions.

    `compare` generates the last reply again, without and with the interventions.

    Requests with and without the interventions have the same pytree structure, so all replies use
    the same compiled programs, and `compare` generates its two replies in one batch.

    Attributes:
      model: the model.
      edits: the interventions.
      monitor: the `Monitor` that projects the replies, or None.
      settings: a dict of the `Request` arguments max_new_tokens, temperature, top_p and seed.
      system: the system prompt, or None.
      turns: the turns so far.
      edited: whether the interventions apply to the next reply.

    Examples::

        model, axis = jp.load("mini"), jp.load_axis("mini")
        cap = jp.cap(axis, layers=slice(4, 8), floor="p25")
        session = Session(model, interventions=cap, monitor=Monitor(model, axis))
        for piece in session.reply("Who are you?"):
            print(piece.text, end="")
        print(session.turns[-1].projections)
    """

    def __init__(self, model: Model, *, interventions: Interventions | None = None,
                 monitor: Monitor | None = None, system: str | None = None,
                 max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0,
                 seed: int = 0) -> None:
        """Start an empty conversation. The programs are compiled when the first reply is generated.

        Args:
          model, monitor, system: see the attributes.
          interventions: the interventions, or None.
          max_new_tokens, temperature, top_p, seed: as for `Request`.

        Raises:
          UserError: the model has no tokenizer, or a setting is out of range.
        """
        if model.tokenizer is None:
            raise UserError(f"{model.name} has no tokenizer; a conversation needs one")
        sampling(1, temperature=temperature, top_p=top_p, seed=seed)
        prompts.check_settings(max_new_tokens=max_new_tokens)
        self.model, self.edits, self.monitor = model, given(interventions), monitor
        self.settings = {"max_new_tokens": max_new_tokens, "temperature": temperature,
                         "top_p": top_p, "seed": seed}
        self.system = system
        self.turns: list[Turn] = []
        self.edited = bool(self.edits.edits)
        self._off = _without_tokens(self.edits)
        self._engine = Engine(model, rows=_ROWS, lanes=1, chunk=CHUNK)

    def __repr__(self) -> str:
        return line("Session", quoted(self.model.name), count(len(self.turns), "turn"),
                    repr(self.edits) if self.edits.edits else "")

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation, with its system prompt, as a list of {"role", "content"}."""
        return self._talk(self.turns)

    def reply(self, message: str, cancelled: Callable[[], bool] = _never) -> Iterator[Piece]:
        """Stream the reply to a message, then add the complete turn to the conversation.

        Args:
          message: the user message.
          cancelled: a function that is called before each piece except the last. If the function
            returns True, the reply ends and the turn is not added.

        Raises:
          ContextFull: the conversation leaves no room for a reply.
          UserError: the message is invalid, or activations are not finite.
        """
        handle = self._submit(self.turns, message, self.edited)
        for piece in self._pieces(handle, message, self.edited, cancelled):
            if piece.turn is not None:
                self.turns.append(piece.turn)
            yield piece

    def compare(self, cancelled: Callable[[], bool] = _never) -> Iterator[tuple[bool, Piece]]:
        """Generate the last reply again, without and with the interventions.

        Both replies continue the same earlier turns and use the same random draws. The session's
        conversation does not change.

        Args:
          cancelled: as for `reply`.

        Returns:
          An iterator over (on, piece), where `on` is whether the interventions are applied. All
          pieces of the reply without interventions precede the pieces of the other reply. The
          iterator raises UserError if activations are not finite.

        Raises:
          ContextFull: as for `reply`.
          UserError: the conversation has no reply, or the session has no interventions.
        """
        if not self.turns:
            raise UserError("there is no reply to compare yet; send a message first")
        if not self.edits.edits:
            raise UserError("there is nothing to compare: the session has no interventions; start "
                            "a session with interventions")
        *earlier, last = self.turns
        handles = {on: self._submit(earlier, last.message, on) for on in (False, True)}
        return self._both(handles, last.message, cancelled)

    def _both(self, handles: dict[bool, Handle], message: str,
              cancelled: Callable[[], bool]) -> Iterator[tuple[bool, Piece]]:
        """Stream the pieces of the first request and then of the second; both share a batch."""
        try:
            for on, handle in handles.items():
                turn = None
                for piece in self._pieces(handle, message, on, cancelled):
                    turn = piece.turn
                    yield on, piece
                if turn is None:
                    return
        finally:
            for handle in handles.values():
                self._engine.cancel(handle)

    def undo(self) -> Turn:
        """Remove the last turn and return it.

        Raises:
          UserError: the conversation has no turn.
        """
        if not self.turns:
            raise UserError("there is no turn to remove")
        return self.turns.pop()

    def _talk(self, turns: list[Turn]) -> list[dict[str, str]]:
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + [{"role": role, "content": text} for turn in turns
                       for role, text in (("user", turn.message), ("assistant", turn.reply))]

    def _submit(self, turns: list[Turn], message: str, edited: bool) -> Handle:
        """Submit a request for the reply to a message after the given turns.

        Raises:
          ContextFull: the conversation leaves no room for a reply.
        """
        talk = [*self._talk(turns), {"role": "user", "content": message}]
        row = prompts.encode(self.model, talk)
        context = self.model.config.max_context
        if row.tokens.size >= context:
            raise ContextFull(f"the conversation has {row.tokens.size:,} tokens with this message; "
                              f"the context of {self.model.name} is limited to {context:,} tokens, "
                              "including the reply: shorten the message or remove earlier turns")
        return self._engine.submit(Request(
            row, interventions=self.edits if edited else self._off,
            capture=None if self.monitor is None else self.monitor.capture, **self.settings))

    def _pieces(self, handle: Handle, message: str, edited: bool,
                cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """Stream the pieces of a request; the last piece contains the turn."""
        monitor, values = self.monitor, []
        try:
            for event in self._engine.stream(handle):
                if event.reply is None and cancelled():
                    return
                means: dict[int, float] = {}
                if monitor is not None:
                    values.append(event.projections[NAME])
                    means = monitor.mean(np.concatenate(values))
                turn = None
                if event.reply is not None:
                    turn = self._turn(event.reply, message, edited, means)
                yield Piece(event.text, means, turn)
        finally:
            self._engine.cancel(handle)  # no effect if the reply is complete

    def _turn(self, reply: Reply, message: str, edited: bool, means: dict[int, float]) -> Turn:
        edits = self.edits if edited else Interventions()
        check_finite(self.model, reply, edits)
        return Turn(message, reply.text, reply.finish, reply.tokens.size,
                    reply.row.tokens.size + reply.tokens.size, edited, means,
                    edit_counts(edits, reply.applied) if edited else [])


def _without_tokens(edits: Interventions) -> Interventions:
    """Return interventions of the same structure that select no tokens.

    Each token test gets an empty range of messages. Its token kinds are kept, because they
    determine whether the compiled program tracks code fences.
    """
    tables = []
    for table in edits.edits:
        where = np.array(table.where)
        where[:, 3:] = FOREVER
        tables.append(table.replace(where=where))
    return Interventions(tuple(tables))
