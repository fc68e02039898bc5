"""Requests to an engine, and the handles and events that the engine returns."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import brief, count, line, quoted
from jaxpersona.calls import checked_class
from jaxpersona.captures.capture import Capture, joined
from jaxpersona.captures.projections import Projections
from jaxpersona.engine.replies import Reply
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@checked_class
@dataclasses.dataclass(frozen=True)
class Request:
    """A request to generate the reply to a conversation.

    Attributes:
      conversation: a list of {"role", "content"}, a string (one user message), a `chat.Row`, or
        token ids.
      interventions: edits of the activations, created without `rows=`.
      capture: a capture of activations, or a list of captures, which is stored as one `Capture`.
      max_new_tokens: the maximum number of tokens in the reply; the model's context and the
        largest of the engine's `sizes` limit it further.
      temperature, top_p, top_k, seed: the sampling settings (`sampling.Sampling`).
      stop: a stop string or a list of stop strings; the first match ends the reply. A stop string
        may span several tokens. `Reply.text` ends before it.
      id: uint32, the id that seeds the random draws together with `seed`; default: a hash of the
        prompt's tokens. An engine generates equal replies to requests with equal attributes.
      thinking: whether the reply may begin with a thinking block.

    Examples:
      >>> import jaxpersona as jp
      >>> request = jp.Request("Who are you?", max_new_tokens=40, stop=["."])
      >>> request.temperature, request.seed
      (0.0, 0)
    """

    __repr__ = brief

    conversation: Any
    interventions: Interventions | None = None
    capture: Capture | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Any = ()
    id: int | None = None
    thinking: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "capture", joined(self.capture))


def projected(request: Request) -> list[str]:
    """Return the names of a request's projection captures, whose values are streamed."""
    readings = {} if request.capture is None else request.capture.readings
    return [name for name, reading in readings.items() if isinstance(reading, Projections)]


@dataclasses.dataclass(frozen=True)
class Event:
    """A part of a streamed reply.

    Attributes:
      text: the new text; the texts of all events concatenate to `Reply.text`, unless later tokens
        changed text that was already streamed (`stopping.Written`).
      tokens: [n] int32, the new token ids.
      projections: the projections [n, L, K] of the new tokens onto K directions at L layers, by
        capture name. A token that completes a stop string has no projections.
      reply: the complete reply in the last event, otherwise None.

    Examples:
      >>> import jaxpersona as jp
      >>> engine = jp.Engine(jp.load("mini"), rows=2)
      >>> handle = engine.submit(jp.Request("Who are you?", max_new_tokens=2))
      >>> events = list(engine.stream(handle))
      >>> "".join(event.text for event in events) == events[-1].reply.text
      True
    """

    text: str
    tokens: Int[np.ndarray, " n"]
    projections: dict[str, Float[np.ndarray, "n L K"]]
    reply: Reply | None = None

    def __repr__(self) -> str:
        return line("Event", quoted(self.text, 60), count(len(self.tokens), "token"),
                    "" if self.reply is None else self.reply.finish)


class QueueFull(RuntimeError):
    """Raised by `Engine.submit` if the engine's queue is full.

    Examples:
      >>> import jaxpersona as jp
      >>> engine = jp.Engine(jp.load("mini"), rows=2, queue=1)
      >>> first = engine.submit(jp.Request("Who are you?"))
      >>> try:
      ...     engine.submit(jp.Request("Who are you?"))
      ... except jp.QueueFull as error:
      ...     print(error)
      the queue is full (limit: 1); submit again later, or create the engine with a larger queue
    """


def detached(error: BaseException, note: str = "") -> BaseException:
    """Return a copy of an error without its traceback, cause and context.

    The frames of a traceback keep the arrays in their local variables alive. An error that cannot
    be copied is itself changed and returned.

    Args:
      error: the error.
      note: a note to add to the copy (`BaseException.add_note`).
    """
    try:
        copied = copy.copy(error)
    except Exception:
        copied = error
    copied = copied if type(copied) is type(error) else error
    notes = [*getattr(error, "__notes__", ()), *([note] if note else [])]
    if notes:
        copied.__notes__ = notes
    copied.__cause__ = copied.__context__ = None
    return copied.with_traceback(None)


class Handle:
    """A handle to a submitted request, for `Engine.result`, `Engine.stream` and `Engine.cancel`.

    Attributes:
      request: the submitted request.
      number: the request's index in the order of submission.

    Examples:
      >>> import jaxpersona as jp
      >>> engine = jp.Engine(jp.load("mini"), rows=2)
      >>> handle = engine.submit(jp.Request("Who are you?", max_new_tokens=2))
      >>> len(engine.result(handle).tokens), handle.done
      (2, True)
    """

    def __init__(self, request: Request, number: int, owner: object = None) -> None:
        self.request, self.number = request, number
        self._owner = owner  # an object that identifies the engine
        self._lock = threading.Lock()
        self._tokens = np.zeros(0, np.int32)
        self._projections: dict[str, np.ndarray] = {}
        self._reply: Reply | None = None
        self._error: BaseException | None = None
        self._streamed = False

    @property
    def done(self) -> bool:
        """Whether the request is complete, cancelled or failed."""
        with self._lock:
            return self._reply is not None or self._error is not None

    def _look(self) -> tuple[np.ndarray, dict[str, np.ndarray], Reply | None, BaseException | None]:
        with self._lock:
            return self._tokens, self._projections, self._reply, self._error

    def _grow(self, tokens: np.ndarray, projections: dict[str, np.ndarray]) -> None:
        """Set the streamed tokens and projections, unless the request has ended."""
        with self._lock:
            if self._reply is None and self._error is None:
                self._tokens, self._projections = tokens, projections

    def _finish(self, reply: Reply | None, error: BaseException | None = None) -> bool:
        """Set the reply or the error; return False if the request has already ended."""
        with self._lock:
            if self._reply is not None or self._error is not None:
                return False
            self._reply, self._error = reply, error
            return True

    def _cancel(self, reply: Callable[[np.ndarray], Reply]) -> None:
        """Set the reply that a function creates from the streamed tokens, if it is not set yet.

        No tokens are added in the meantime, so the events of a stream contain exactly the tokens of
        this reply. A request that has ended is not changed.
        """
        with self._lock:
            if self._reply is None and self._error is None:
                self._reply = reply(self._tokens)

    @staticmethod
    def of(given: Any, owner: object = None) -> Handle:
        """Check that a value is a handle of an engine, and return it.

        Args:
          given: the value.
          owner: the object that identifies the engine.

        Raises:
          UserError: the value is not a handle, or is a handle of another engine.
        """
        if not isinstance(given, Handle):
            raise UserError(f"handle is of type {type(given).__name__}; give the result of "
                            "engine.submit(request)")
        if given._owner is not owner:
            raise UserError(f"handle is {given!r}, a handle of another engine; use the engine "
                            "whose submit method returned it")
        return given

    def __repr__(self) -> str:
        tokens, _, reply, error = self._look()
        state = (f"failed: {type(error).__name__}" if error is not None
                 else reply.finish if reply is not None
                 else f"unfinished, streamed tokens: {tokens.size}")
        return f"Handle({self.number}: {state})"
