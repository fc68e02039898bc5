"""Generation of replies to a long stream of conversations in bounded memory.

Conversations are encoded in groups. Each group is sorted by shape and then queued, so that prompts
of the same shape are prefilled together and lanes are rarely replaced. The order does not change
the replies (`engine.lanes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.captures.capture import Capture, joined
from jaxpersona.distributed.context import own_context
from jaxpersona.distributed.sharding import off_mesh
from jaxpersona.engine import prompts
from jaxpersona.engine.edits import SharedEdits
from jaxpersona.engine.generate import asks_for_code, lane_opener, stops_of
from jaxpersona.engine.nonfinite import explain
from jaxpersona.engine.programs import State
from jaxpersona.engine.replies import Reply, unpack
from jaxpersona.engine.sampling import sampling
from jaxpersona.engine.scheduler import Scheduler
from jaxpersona.engine.stopping import text_of
from jaxpersona.engine.tasks import Task, piece_of, prefix_key, shape_of
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import given
from jaxpersona.models.model import check_model
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

Asked = tuple[Any, Any, int]
_LEAST_AHEAD = 256


class Stream:
    """An iterable over the replies to conversations that may not all fit in memory.

    Each reply is bit-identical to the reply of `generate` with the same settings and id.

    Attributes:
      tokens: the number of tokens in all finished replies, including stop tokens.

    Examples:
      >>> import jaxpersona as jp
      >>> from jaxpersona.engine.stream import Stream
      >>> asked = ((i, "Who are you?", i) for i in range(3))
      >>> replies = Stream(jp.load("mini"), asked, max_new_tokens=2, batch_size=2)
      >>> sorted(tag for found in replies for tag, _ in found)
      [0, 1, 2]
    """

    def __init__(self, model: Model, asked: Iterable[Asked], *,
                 capture: Capture | Sequence[Capture] | None = None, max_new_tokens: int = 512,
                 temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
                 batch_size: int = 32, share_prefix: bool = False) -> None:
        """Prepare the weights; no conversation is read from `asked` before the first step.

        Args:
          model: the result of `load`.
          asked: tuples (tag, conversation, id). The tag is returned with the reply, and the id
            (uint32) seeds the random draws.
          capture, max_new_tokens, temperature, top_p, seed, batch_size, share_prefix: as for
            `generate`, with one value for all conversations.

        Raises:
          UserError: a setting is out of range or not supported on the model's mesh, or the capture
            does not match the model.
        """
        check_model(model)
        prompts.check_settings(batch_size=batch_size, max_new_tokens=max_new_tokens)
        edits, readings = off_mesh((given(None), joined(capture)))
        self._capture = Capture() if readings is None else readings
        prompts.check_edits(model, edits, 1, self._capture)
        prompts.check_rows(model, batch_size, share_prefix)
        self._model, self._edits, self._rows = model, SharedEdits(edits), batch_size
        self._max_new = min(max_new_tokens, model.config.max_context)
        self._prefix = share_prefix
        self._settings = sampling(1, temperature=temperature, top_p=top_p, seed=seed).take([0])
        self._asked: Iterator[Asked] = iter(asked)
        self._ahead = max(_LEAST_AHEAD, 8 * batch_size)
        self._tags: dict[int, Any] = {}
        self._count, self.tokens = 0, 0
        self._finished: list[tuple[Any, Reply]] = []
        self._exhausted = False
        with own_context():
            self._scheduler = Scheduler(
                lane_opener(model, self._edits, self._capture,
                            stops_of(model, asks_for_code(edits, self._capture)),
                            bool(self._settings.temperature[0] == 0), batch_size), self._collect)

    def __iter__(self) -> Iterator[list[tuple[Any, Reply]]]:
        """Yield one list per step: the (tag, reply) pairs of the replies that the step finished."""
        while not self.done:
            yield self.step()

    @property
    def done(self) -> bool:
        """Whether the replies to all conversations are finished."""
        return self._exhausted and self._scheduler.idle

    def step(self) -> list[tuple[Any, Reply]]:
        """Encode more conversations if few are queued, and run one step of the scheduler.

        Returns:
          A (tag, reply) pair for each reply that the step finished.

        Raises:
          UserError: a conversation is invalid or fills the context, or activations are not finite.
        """
        with own_context():
            while not self._exhausted and len(self._scheduler.waiting) < 2 * self._rows:
                self._take()
            if not self._scheduler.idle:
                self._scheduler.step()
        found, self._finished = self._finished, []
        return found

    def _take(self) -> None:
        """Encode and queue the next conversations.

        Conversations for the lane of the last queued prompt come first, or, if the queue is empty,
        conversations for the open lane.
        """
        waiting = self._scheduler.waiting
        tasks = [self._task(*one) for one in itertools.islice(self._asked, self._ahead)]
        self._exhausted = len(tasks) < self._ahead
        lane = waiting[-1].lane if waiting else next(iter(self._scheduler.lanes), None)
        waiting.extend(sorted(tasks, key=lambda task: (
            task.lane != lane, task.lane, task.shape, prefix_key(task),
            self._edits.key(task) if task.shape.prefix else ())))

    def _task(self, tag: Any, conversation: Any, row_id: int) -> Task:
        model = self._model
        row = prompts.encode(model, conversation)
        limit = int(prompts.limits(model, [row], self._max_new)[0])
        shape = shape_of(row, self._max_new, self._prefix, model.config.max_context, self._rows,
                         piece_of(model.config, model.params.like, self._edits.edits, self._rows))
        self._tags[self._count] = tag
        self._count += 1
        return Task(self._count - 1, row, int(row_id), limit, self._settings, shape, shape.slots)

    def _collect(self, tasks: list[Task], rows: np.ndarray, state: State) -> None:
        """Store the replies of finished tasks; raise a `UserError` for non-finite activations."""
        model, stops = self._model, set(self._model.stop_ids)
        for task, finished in zip(tasks, unpack(state, rows), strict=True):
            tag, tokens = self._tags.pop(task.number), finished.tokens
            self.tokens += tokens.size
            if finished.nonfinite:
                raise UserError(explain(model, chat.answered(model.tokenizer, task.row, tokens),
                                        given(None), f"conversation {task.number}",
                                        "a reply ended because of"))
            ended = bool(tokens.size) and int(tokens[-1]) in stops
            tokens = tokens[:-1] if ended else tokens
            self._finished.append((tag, Reply(
                text_of(model.tokenizer, tokens), np.array(tokens), "stop" if ended else "length",
                task.row, finished.captured, finished.applied)))
