"""An inference engine for concurrent requests with individual settings and few compiled programs.

Requests of the same kind (`engine.kinds`) share the programs of a lane. A request's interventions
are written to the lane's tables, so new interventions within the capacity need no compilation. For
a given number of rows, capacity and cache size, a request's tokens and captures are bit-identical
regardless of concurrent requests.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import count, line, quoted, shown
from jaxpersona.calls import checked_class
from jaxpersona.captures.capture import Capture
from jaxpersona.distributed.context import own_context
from jaxpersona.distributed.sharding import off_mesh, rows_divisor
from jaxpersona.engine import prompts, stopping
from jaxpersona.engine.background import Background
from jaxpersona.engine.compiled import KEPT
from jaxpersona.engine.edits import RowEdits, checked_capacity, for_one_row, neutral_row
from jaxpersona.engine.generate import asks_for_code
from jaxpersona.engine.kinds import Kind, examples, plain_shapes
from jaxpersona.engine.lanes import Lane
from jaxpersona.engine.programs import State
from jaxpersona.engine.replies import Finished, Reply, so_far, unpack
from jaxpersona.engine.request import Event, Handle, QueueFull, Request, detached, projected
from jaxpersona.engine.rows import take_row
from jaxpersona.engine.sampling import sampling
from jaxpersona.engine.scheduler import Scheduler
from jaxpersona.engine.stats import RunStats, Stats
from jaxpersona.engine.tasks import Shape, Task, piece_of, shape_of, shape_within
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.models.model import check_model
from jaxpersona.models.prepared import fast_params
from jaxpersona.text.chat import Row

if TYPE_CHECKING:
    from jaxpersona.models.model import Model


@checked_class
class Engine:
    """An engine that generates replies to concurrent requests with one model.

    `stream` and `result` run the engine in the caller's thread, unless the engine runs in a
    background thread (`running`). All methods are thread-safe.

    Examples:
      >>> import jaxpersona as jp
      >>> engine = jp.Engine(jp.load("mini"), rows=2)
      >>> handle = engine.submit(jp.Request("Who are you?", max_new_tokens=2))
      >>> sum(len(event.tokens) for event in engine.stream(handle))
      2
    """

    def __init__(self, model: Model, *, rows: int = 32, capacity: Interventions | None = None,
                 sizes: Sequence[int] | None = None, lanes: int = 4, chunk: int = 16,
                 queue: int = 4096) -> None:
        """Prepare the weights; programs are compiled on first use, or by `warm_up`.

        Args:
          model: the result of `load`.
          rows: B, the number of rows in a lane. It affects the floating-point rounding of results.
          capacity: the result of `reserve`, for any number of rows. It limits the layers, site and
            number of rank-one edits in a request, so that requests with different edits share
            programs. None: every structure of interventions has its own programs and lanes.
          sizes: the cache sizes, in slots per row. None: a size per request (`tasks.cache_size`).
          lanes: the maximum number of lanes; each has its own cache.
          chunk: the maximum number of decode steps between two transfers to the host.
          queue: the maximum number of queued requests.

        Raises:
          UserError: a setting is not a positive integer, `sizes` is not a non-empty list of
            positive integers, `rows` is not a multiple of the number of batch shards, or the
            capacity is not the result of `reserve` or does not match the model.
        """
        check_model(model)
        if sizes is not None and not (isinstance(sizes, (list, tuple)) and sizes):
            raise UserError(f"sizes is {shown(sizes)}; give cache sizes in slots, such as [256]")
        numbers = {f"sizes[{i}]": size for i, size in enumerate(() if sizes is None else sizes)}
        prompts.check_settings(rows=rows, lanes=lanes, chunk=chunk, queue=queue, **numbers)
        ways = rows_divisor(model.params.like)
        if rows % ways:
            raise UserError(f"rows is {rows}; on this mesh, it must be a multiple of {ways}")
        self.capacity = checked_capacity(capacity, model.config.n_layers, model.config.d_model)
        self.model, self.rows, self.queue = model, rows, queue
        self.sizes = None if sizes is None else tuple(sorted(set(map(int, sizes))))
        with own_context():
            self._params = fast_params(model, rows)
        self._together = max(1, rows // 4) if model.mesh is None else rows
        self._stats = Stats()
        self._scheduler = Scheduler(self._open, self._collect, lanes=lanes, batched=False,
                                    chunk=chunk, failed=self._fail, pause=self._streams)
        self._device = threading.RLock()  # guards the scheduler and the device
        self._changed = threading.Condition()  # guards the fields below; notified on changes
        self._inbox: deque[Task] = deque()
        self._handles: dict[int, tuple[Handle, Task]] = {}
        self._count, self._version = 0, 0
        self._background = Background(self._changed, lambda: bool(self._handles), self.step)
        self._owner = object()  # identifies the engine in its handles

    def __repr__(self) -> str:
        return line("Engine", quoted(self.model.name), count(self.rows, "row"))

    @property
    def stats(self) -> RunStats:
        """The counts of decode steps, live rows and prompt tokens for all requests so far."""
        return self._stats.snapshot()

    def submit(self, request: Request) -> Handle:
        """Check a request, append it to the queue and return its handle.

        Raises:
          UserError: `request` is not a `Request`, its conversation or a setting is invalid, or it
            does not match the model or exceeds the capacity or the cache sizes.
          QueueFull: `queue` requests are already queued.
        """
        if not isinstance(request, Request):
            raise UserError(f"request is of type {type(request).__name__}; give a jp.Request")
        with own_context():
            task = self._task(request)
        with self._changed:
            if len(self._inbox) + len(self._scheduler.waiting) >= self.queue:
                raise QueueFull(f"the queue is full (limit: {self.queue}); submit again later, or "
                                "create the engine with a larger queue")
            task.number = self._count
            self._count += 1
            handle = Handle(request, task.number, self._owner)
            self._handles[task.number] = (handle, task)
            self._inbox.append(task)
            self._changed.notify_all()
        return handle

    def step(self) -> bool:
        """Admit queued requests, and decode a chunk in every lane.

        If an admitted request is streamed, the step ends without decoding, so that the first token
        is sent sooner, unless the previous step also ended without decoding.

        Returns:
          True if any request is unfinished.
        """
        with self._device:
            return self._step()

    def result(self, handle: Handle) -> Reply:
        """Wait until the reply to a request is complete, and return the reply.

        Raises:
          UserError: the handle does not belong to this engine.
          BaseException: a copy of the error that ended the request.
        """
        while not Handle.of(handle, self._owner).done:
            self._advance(handle)
        _, _, reply, error = handle._look()
        if error is not None:
            raise detached(error)
        assert reply is not None
        return reply

    def stream(self, handle: Handle) -> Iterator[Event]:
        """Yield events as a reply is generated; the last event contains the complete reply.

        Raises:
          UserError: the handle does not belong to this engine.
          BaseException: a copy of the error that ended the request.
        """
        request = Handle.of(handle, self._owner).request
        handle._streamed = True
        written = stopping.Written(self.model.tokenizer, stopping.checked(request.stop))
        sent = 0
        while True:
            tokens, projections, reply, error = handle._look()
            if error is not None:
                raise detached(error)
            if reply is not None:
                start = reply.row.tokens.size + sent
                rest = {name: np.moveaxis(reply.captured[name][:, start:], 0, 1)
                        for name in projected(request) if name in reply.captured}
                yield Event(written.finish(reply.text), reply.tokens[sent:], rest, reply)
                return
            if tokens.size > sent:
                new = {name: value[sent : tokens.size] for name, value in projections.items()}
                yield Event(written.push(tokens), tokens[sent:], new)
                sent = tokens.size
            self._advance(handle, tokens.size)

    def cancel(self, handle: Handle) -> None:
        """Cancel an unfinished request; its reply then contains the tokens streamed so far.

        Raises:
          UserError: the handle does not belong to this engine.
        """
        strings = stopping.checked(Handle.of(handle, self._owner).request.stop)
        with self._changed:
            if (entry := self._handles.get(handle.number)) is None:
                return
            handle._cancel(lambda tokens: Reply(
                stopping.text_of(self.model.tokenizer, tokens, strings), tokens, "cancelled",
                entry[1].row, {}, ()))
            entry[1].cancelled = True
            del self._handles[handle.number]
            self._changed.notify_all()

    @contextlib.contextmanager
    def running(self) -> Iterator[Engine]:
        """Run the engine in a background thread within a `with` block.

        Unfinished requests are kept after the block ends; `result` and `stream` continue them.

        Raises:
          UserError: the engine already runs in the background.
        """
        with self._background.running():
            yield self

    def warm_up(self, requests: Sequence[Request] | None = None) -> None:
        """Compile the programs before the first request, without running a request.

        The maximum number of programs in memory is raised to the number of these programs. If the
        environment variable `JAXPERSONA_PROGRAMS` sets a lower maximum, a warning is emitted.

        Args:
          requests: one example per kind and padded prompt length. A kind is defined by cache size,
            capture, stop strings and greedy or sampled decoding; without a capacity, also by the
            structure of the interventions and whether they select code. None: compile for greedy
            and sampled requests with interventions within the capacity, without captures or stop
            strings, for each size in `sizes` and each padded prompt length.

        Raises:
          UserError: the engine has unfinished requests, `requests` is None and the engine has no
            `sizes`, or `requests` is not a list of valid requests.
        """
        if requests is None and self.sizes is None:
            raise UserError("the engine has no sizes; use Engine(sizes=…), or pass example "
                            "requests to warm_up")
        requests = None if requests is None else examples(requests)
        with self._device, own_context(), KEPT.keeping():
            if self._handles:
                raise UserError("the engine has unfinished requests; call warm_up before submit")
            try:
                if requests is None:
                    for plain in plain_shapes(self.model, self.sizes or (), self.capacity,
                                              self.rows):
                        self._compile(*plain)
                    return
                for request in requests:
                    task = self._task(request)
                    lane = self._compile(task.lane, task.shape)
                    for name in projected(request):
                        take_row(lane.state.carry.captured[name].values, np.int32(0))
            except BaseException:  # a lane may refer to donated arrays
                self._scheduler.lanes.clear()
                raise

    def _compile(self, kind: Any, shape: Shape) -> Lane:
        """Return a kind's lane, with all its programs compiled for prompts of a shape."""
        lane = self._scheduler.lane_of(kind)
        assert lane is not None
        lane.compile(shape)
        lane.end([])
        return lane

    def _task(self, request: Request) -> Task:
        """Check a request and convert it to a task with an encoded prompt."""
        model = self.model
        row = prompts.encode(model, request.conversation, thinking=request.thinking)
        prompts.check_settings(max_new_tokens=request.max_new_tokens)
        edits, capture = off_mesh((given(request.interventions), request.capture))
        capture = Capture() if capture is None else capture
        if edits.rows is not None:
            raise UserError("interventions have rows=, but a request has one row; omit rows=")
        prompts.check_edits(model, edits, 1, capture)
        most = min(request.max_new_tokens, model.config.max_context)
        limit = int(prompts.limits(model, [row], most)[0])
        settings = sampling(1, temperature=request.temperature, top_p=request.top_p,
                            top_k=request.top_k, seed=request.seed).take([0])
        own_id = None if request.id is None else [request.id]
        row_id = int(prompts.row_ids([row], own_id, name="id")[0])
        own = for_one_row(edits, self.capacity)
        shape, limit = self._shape(row, limit, own)
        strings = stopping.checked(request.stop)
        if strings and model.tokenizer is None:
            raise UserError(f"stop is {shown(request.stop, 60)}, but {model.name} has no "
                            "tokenizer to match stop strings; omit stop")
        kind = Kind(shape.slots, bool(settings.temperature[0] == 0), asks_for_code(own, capture),
                    strings, capture, neutral_row(own))
        return Task(-1, row, row_id, limit, settings, shape, kind, own)

    def _shape(self, row: Row, limit: int, edits: Interventions) -> tuple[Shape, int]:
        """Return the static sizes for a prompt's prefill, and the reply's length limit."""
        piece = piece_of(self.model.config, self._params.like, edits, self.rows)
        if self.sizes is not None:
            return shape_within(row, limit, self.sizes, piece)
        context = self.model.config.max_context
        return shape_of(row, limit, False, context, self.rows, piece), limit

    def _streams(self, tasks: Sequence[Task]) -> bool:
        """Return whether the request of any task is streamed, for `pause` of the scheduler."""
        held = [self._handles.get(task.number) for task in tasks]
        return any(entry is not None and entry[0]._streamed for entry in held)

    def _open(self, kind: Any) -> Lane:
        """Return a new lane for a kind of request."""
        config, params, rows = self.model.config, self._params, self.rows
        return Lane(config, params, kind.setting(self.model), RowEdits(kind.neutral, rows), rows,
                    self._together, piece_of(config, params.like, kind.neutral, rows), self._stats)

    def _step(self) -> bool:
        """Run `step`; the caller must hold the device lock."""
        with own_context():
            with self._changed:
                while self._inbox:
                    self._scheduler.waiting.append(self._inbox.popleft())
                for task in [t for t in self._scheduler.waiting if t.cancelled]:
                    self._scheduler.waiting.remove(task)
            try:
                self._scheduler.step()
                self._look()
            except BaseException as error:  # an interrupt may also leave a lane in an invalid state
                self._scheduler.lanes.clear()
                self._fail([task for _, task in list(self._handles.values())], error)
                raise
            finally:
                with self._changed:
                    self._version += 1
                    self._changed.notify_all()
        with self._changed:
            return bool(self._inbox) or not self._scheduler.idle

    def _advance(self, handle: Handle, seen: int = 0) -> None:
        """Run one step, or wait for one step of the background thread.

        In the caller's thread, no step runs if the handle is done or has more than `seen` tokens.
        """
        with self._changed:
            version, background = self._version, self._background.active
            if background:
                self._changed.wait_for(lambda: self._version != version or handle.done
                                       or not self._background.active)
                return
        with self._device:
            if (not handle.done and handle._look()[0].size <= seen
                    and not self._background.active):
                self._step()

    def _collect(self, tasks: list[Task], rows: np.ndarray, state: State) -> None:
        """Copy the replies of finished tasks from rows of a state to the handles."""
        accepting = self._scheduler.lanes[tasks[0].lane].setting.stops.accepting
        for task, finished in zip(tasks, unpack(state, rows, accepting), strict=True):
            reply = self._reply(task, finished)
            with self._changed:
                entry = self._handles.pop(task.number, None)
            if entry is not None:
                entry[0]._finish(reply)

    def _reply(self, task: Task, finished: Finished) -> Reply:
        """Return the reply of a finished task."""
        tokens, match = finished.tokens, finished.matched
        ended = bool(tokens.size) and int(tokens[-1]) in self.model.stop_ids
        tokens = tokens[:-1] if ended else tokens
        handle = self._handles.get(task.number)
        strings = () if handle is None else stopping.checked(handle[0].request.stop)
        finish = "nonfinite" if finished.nonfinite else "stop" if ended or match else "length"
        return Reply(stopping.text_of(self.model.tokenizer, tokens, strings), tokens, finish,
                     task.row, finished.captured, finished.applied)

    def _fail(self, tasks: list[Task], error: BaseException) -> None:
        """End the tasks' requests with a copy of an error; a note on the copy has the traceback."""
        kept = detached(error, "Traceback of the engine's step:\n" + "".join(
            traceback.format_exception(error)).rstrip())
        for task in tasks:
            task.cancelled = True  # the task may still be in the queue
            with self._changed:
                entry = self._handles.pop(task.number, None)
            if entry is not None:
                entry[0]._finish(None, kept)

    def _look(self) -> None:
        """Copy the tokens and projections generated so far to the handles of streamed requests."""
        for lane in self._scheduler.lanes.values():
            streamed, handles = [], []
            for i, task in enumerate(lane.tasks):
                entry = None if task is None else self._handles.get(task.number)
                if task is not None and entry is not None and entry[0]._streamed:
                    streamed.append((i, task, projected(entry[0].request)))
                    handles.append(entry[0])
            if streamed:
                found = so_far(lane.state, streamed, self.model.stop_ids)
                for handle, new in zip(handles, found, strict=True):
                    handle._grow(*new)
