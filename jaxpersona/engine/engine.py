"""An engine: requests of any settings, one after another or together, through few programs.

A lane holds rows whose programs are the same: one cache size, one structure of interventions, one
capture, one set of stop strings. Interventions of a row are written into the lane's tables, so new
ones within the capacity compile nothing. At one number of rows, capacity and list of cache sizes a
request's tokens and captures are the same bits alone and among any others.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.captures.projections import Projections
from jaxpersona.distributed import processes
from jaxpersona.distributed.sharding import off_mesh, rows_divisor, unset_mesh
from jaxpersona.engine import prompts, stopping
from jaxpersona.engine.compiled import program
from jaxpersona.engine.edits import RowEdits, for_one_row, idle_row
from jaxpersona.engine.generate import asks_for_code
from jaxpersona.engine.kinds import Kind
from jaxpersona.engine.lanes import Lane, Shape, Task, fast_params, shape_of
from jaxpersona.engine.programs import State
from jaxpersona.engine.prompts import bucket
from jaxpersona.engine.replies import Finished, Reply, unpack
from jaxpersona.engine.request import Event, Handle, QueueFull, Request
from jaxpersona.engine.sampling import sampling
from jaxpersona.engine.scheduler import Scheduler
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions, given
from jaxpersona.runtime import own_rules
from jaxpersona.text.chat import Row

if TYPE_CHECKING:
    from jaxpersona.models.model import Model


class Engine:
    """Runs requests on a model.

    `stream` and `result` run the engine themselves while no background thread does (`running`). All
    methods may be called from any number of threads.

    Example::

        engine = jp.Engine(jp.load("mini"), rows=8)
        handle = engine.submit(jp.Request("Who are you?", max_new_tokens=40))
        for event in engine.stream(handle):
            print(event.text, end="")
    """

    def __init__(self, model: Model, *, rows: int = 32, capacity: Interventions | None = None,
                 sizes: Sequence[int] | None = None, lanes: int = 4, chunk: int = 16,
                 queue: int = 4096) -> None:
        """Prepare the weights; programs are compiled when they are first needed, or by `warm_up`.

        Args:
          model: what `load` returned.
          rows: B, the rows of a lane. It decides how results are rounded.
          capacity: what `reserve` made, for any number of rows: the layers and the longest chain of
            rank-one interventions that a request may bring. All requests share a program then.
            Without it every structure of interventions has programs and lanes of its own.
          sizes: the cache sizes in tokens, prompt and reply together; default: multiples of 64.
          lanes: the most lanes that hold memory at the same time.
          chunk: the most tokens that a row gets between two looks of the host at the device.
          queue: the most requests that wait for a row.

        Raises:
          UserError: a size that is not positive, rows that the mesh does not divide, or a capacity
            of another model.
        """
        numbers = {"rows": rows, "lanes": lanes, "chunk": chunk, "queue": queue}
        for i, size in enumerate(() if sizes is None else sizes):
            numbers[f"sizes[{i}]"] = size
        for name, value in numbers.items():
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise UserError(f"{name} is {value!r}; it must be a positive whole number")
        ways = rows_divisor(model.params.embed_vd)
        if rows % ways:
            raise UserError(f"rows is {rows}; the mesh spreads rows over {ways} devices: use a "
                             f"multiple of {ways}")
        self.capacity = None if capacity is None else off_mesh(given(capacity))
        if self.capacity is not None:
            self.capacity.take(np.array([-1])).check(
                layers=model.config.n_layers, width=model.config.d_model, rows=1)
        self.model, self.rows = model, rows
        self.sizes = None if sizes is None else tuple(sorted(set(map(int, sizes))))
        self.queue = queue
        with unset_mesh(), own_rules():
            self._params = fast_params(model, rows)
        self._together = max(1, rows // 4) if model.mesh is None else rows
        self._scheduler = Scheduler(self._open, self._collect, lanes=lanes, batched=False,
                                    chunk=chunk, failed=self._fail)
        self._device = threading.RLock()  # who holds it may use the scheduler and the device
        self._changed = threading.Condition()  # guards what follows, and is notified of steps
        self._inbox: deque[Task] = deque()
        self._handles: dict[int, tuple[Handle, Task]] = {}
        self._count, self._version = 0, 0
        self._thread: threading.Thread | None = None
        self._leaving = False

    def submit(self, request: Request) -> Handle:
        """Check a request and put it into the queue.

        Raises:
          UserError: a request that does not fit the model, the capacity or the cache sizes;
            argument, value and fix. No other request is affected.
          QueueFull: as many requests wait as `queue` allows.
        """
        if not isinstance(request, Request):
            raise UserError(f"request is a {type(request).__name__}; give a jp.Request")
        with unset_mesh(), own_rules():
            task = self._task(request)
        with self._changed:
            if len(self._inbox) + len(self._scheduler.waiting) >= self.queue:
                raise QueueFull(f"{self.queue} requests wait already; submit again later, or make "
                                "the engine with a longer queue")
            task.number = self._count
            self._count += 1
            handle = Handle(request, task.number)
            self._handles[task.number] = (handle, task)
            self._inbox.append(task)
            self._changed.notify_all()
        return handle

    def step(self) -> bool:
        """Admit waiting requests and run one chunk of every lane.

        Returns:
          Whether anything is left to do.
        """
        with self._device:
            return self._step()

    def result(self, handle: Handle) -> Reply:
        """Wait for a reply.

        Raises:
          BaseException: what the request failed with.
        """
        while not handle.done:
            self._advance(handle)
        _, _, reply, error = handle._look()
        if error is not None:
            raise error
        assert reply is not None
        return reply

    def stream(self, handle: Handle) -> Iterator[Event]:
        """Yield a reply in pieces; the last one has the whole reply.

        Raises:
          BaseException: what the request failed with.
        """
        request = handle.request
        handle._streamed = True
        written = stopping.Written(self.model.tokenizer, stopping.checked(request.stop))
        sent = 0
        while True:
            tokens, projections, reply, error = handle._look()
            if error is not None:
                raise error
            if reply is not None:
                start = reply.row.tokens.size + sent
                rest = {name: np.moveaxis(reply.captured[name][:, start:], 0, 1)
                        for name in _projected(request) if name in reply.captured}
                yield Event(written.finish(reply.text), reply.tokens[sent:], rest, reply)
                return
            if tokens.size > sent:
                fresh = {name: value[sent : tokens.size] for name, value in projections.items()}
                yield Event(written.push(tokens), tokens[sent:], fresh)
                sent = tokens.size
            self._advance(handle, tokens.size)

    def cancel(self, handle: Handle) -> None:
        """End a request; its row is free after the step that runs now. One that is done stays."""
        with self._changed:
            if (found := self._handles.pop(handle.number, None)) is None:
                return
            found[1].cancelled = True
            tokens = handle._look()[0]
            handle._finish(Reply(stopping.text_of(self.model.tokenizer, tokens), tokens,
                                 "cancelled", found[1].row, {}, ()))
            self._changed.notify_all()

    @contextlib.contextmanager
    def running(self) -> Iterator[Engine]:
        """Run the engine in a background thread within a `with` block.

        Requests that are not done at its end stay; `result` and `stream` go on with them.

        Raises:
          UserError: the engine runs already.
        """
        with self._changed:
            if self._thread is not None:
                raise UserError("the engine runs in the background already")
            self._leaving = False
            self._thread = threading.Thread(target=self._run, name="jaxpersona-engine", daemon=True)
        self._thread.start()
        try:
            yield self
        finally:
            with self._changed:
                self._leaving = True
                self._changed.notify_all()
            self._thread.join()
            with self._changed:
                self._thread = None
                self._changed.notify_all()

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Compile all programs that requests like these need, without running them.

        Args:
          requests: one of each kind: prompt length, cache size, capture, stop strings, greedy or
            not, and structure of interventions where there is no capacity.

        Raises:
          UserError: the engine is at work, or a request does not fit.
        """
        with self._device, unset_mesh(), own_rules():
            if self._handles:
                raise UserError("the engine has requests; warm it up before the first")
            for request in requests:
                task = self._task(request)
                lane = self._scheduler.lane_of(task.lane)
                assert lane is not None  # no lane is busy
                lane.admit([], task.shape)
                lane.decode(lane.rows, 0)
                lane.take_out(np.zeros(0, np.int32))
                lane.end([])
                for name in _projected(request):
                    _row(lane.state.captured[name].values, np.int32(0))

    def _task(self, request: Request) -> Task:
        """Encode and check a request."""
        model = self.model
        row = prompts.encode(model, request.conversation, thinking=request.thinking)
        most = request.max_new_tokens
        if not isinstance(most, (int, np.integer)) or most < 1:
            raise UserError(f"max_new_tokens is {most!r}; it must be a positive whole number")
        edits, capture = off_mesh((given(request.interventions), request.capture))
        capture = Capture() if capture is None else capture
        if edits.rows is not None:
            raise UserError("interventions have rows of their own (`rows=`); a request has one "
                             "row, so leave rows= out")
        prompts.check_edits(model, edits, 1, capture)
        limit = int(prompts.limits(model, [row], int(most))[0])
        how = sampling(1, temperature=request.temperature, top_p=request.top_p,
                       top_k=request.top_k, seed=request.seed).take([0])
        name = int(prompts.row_ids([row], None if request.id is None else [request.id])[0])
        own = for_one_row(edits, self.capacity)
        shape, limit = self._shape(row, limit)
        strings = stopping.checked(request.stop)
        if strings and model.tokenizer is None:
            raise UserError(f"stop is {request.stop!r:.60}; {model.name} has no tokenizer, so no "
                             "text can end a reply")
        kind = Kind(shape.slots, bool(how.temperature[0] == 0), asks_for_code(own, capture),
                    strings, capture, idle_row(own))
        return Task(-1, row, name, limit, how, shape, kind, own)

    def _shape(self, row: Row, limit: int) -> tuple[Shape, int]:
        """Return the lengths that a request runs at, and its limit; the largest cache cuts it."""
        if self.sizes is None:
            return shape_of(row, limit, False), limit
        width = bucket(row.tokens.size)
        if width >= self.sizes[-1]:
            raise UserError(f"the conversation has {row.tokens.size} tokens, padded to {width}; "
                             f"the engine's largest cache holds {self.sizes[-1]}, the reply "
                             "included: shorten it, or make the engine with larger sizes")
        limit = min(limit, self.sizes[-1] - width)
        return Shape(0, width, next(x for x in self.sizes if x >= width + limit)), limit

    def _open(self, kind: Any) -> Lane:
        return Lane(self.model.config, self._params, kind.setting(self.model),
                    RowEdits(kind.idle, self.rows), self.rows, self._together)

    def _step(self) -> bool:
        """Do what `step` does; the caller holds the device."""
        with unset_mesh(), own_rules():
            with self._changed:
                while self._inbox:
                    self._scheduler.waiting.append(self._inbox.popleft())
                for task in [t for t in self._scheduler.waiting if t.cancelled]:
                    self._scheduler.waiting.remove(task)
            try:
                self._scheduler.step()
                self._look()
            except BaseException as error:  # an interrupt leaves no lane as it was
                self._scheduler.lanes.clear()
                self._fail([task for _, task in self._handles.values()], error)
                raise
            finally:
                with self._changed:
                    self._version += 1
                    self._changed.notify_all()
        with self._changed:
            return bool(self._inbox) or not self._scheduler.idle

    def _advance(self, handle: Handle, seen: int = 0) -> None:
        """Return once a handle has more than `seen` tokens or is done, or after some work."""
        with self._changed:
            version, background = self._version, self._thread is not None
            if background:
                self._changed.wait_for(lambda: self._version != version or handle.done
                                       or self._thread is None)
                return
        with self._device:
            if not handle.done and handle._look()[0].size <= seen and self._thread is None:
                self._step()

    def _run(self) -> None:
        """Step until `running` ends."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._leaving or self._handles)
                if self._leaving:
                    return
            try:
                self.step()
            except Exception:  # every request of it has failed with the error, and raises it
                continue

    def _collect(self, tasks: list[Task], state: State) -> None:
        kind = tasks[0].lane
        for task, finished in zip(tasks, unpack(state, tasks, kind.match), strict=True):
            reply = self._reply(task, finished)
            with self._changed:
                found = self._handles.pop(task.number, None)
            if found is not None:
                found[0]._finish(reply)

    def _reply(self, task: Task, finished: Finished) -> Reply:
        tokens, match = finished.tokens, finished.matched
        ended = bool(tokens.size) and int(tokens[-1]) in self.model.stop_ids
        tokens = tokens[:-1] if ended else tokens
        handle = self._handles.get(task.number)
        strings = () if handle is None else stopping.checked(handle[0].request.stop)
        finish = "nonfinite" if finished.nonfinite else "stop" if ended or match else "length"
        return Reply(stopping.text_of(self.model.tokenizer, tokens, strings), tokens, finish,
                     task.row, finished.captured, finished.applied)

    def _fail(self, tasks: list[Task], error: BaseException) -> None:
        for task in tasks:
            with self._changed:
                found = self._handles.pop(task.number, None)
            if found is not None:
                found[0]._finish(None, error)

    def _look(self) -> None:
        """Bring the tokens of streamed requests to their handles."""
        for lane in self._scheduler.lanes.values():
            wanted = []
            for i, task in enumerate(lane.tasks):
                held = None if task is None else self._handles.get(task.number)
                if task is not None and held is not None and held[0]._streamed:
                    wanted.append((i, task, held[0]))
            if not wanted:
                continue
            tokens, length, used = processes.fetch(
                (lane.state.tokens, lane.state.length, lane.state.cache.next))
            for i, task, handle in wanted:
                start, count = task.row.tokens.size, int(length[i])
                projections = {}
                for name in _projected(handle.request):
                    count = min(count, int(used[i]) - start)  # the last token has not run yet
                    values = processes.fetch(_row(lane.state.captured[name].values, np.int32(i)))
                    projections[name] = np.moveaxis(values, 2, 0)[start : start + count]
                handle._grow(tokens[i, :count], projections)


def _projected(request: Request) -> list[str]:
    """Return the names of a request's captures of projections."""
    parts = {} if request.capture is None else request.capture.readings
    return [name for name, part in parts.items() if isinstance(part, Projections)]


@program()
def _row(values: jax.Array, row: jax.Array) -> jax.Array:
    """Take one row of [L, B, K, S]."""
    return jax.lax.dynamic_index_in_dim(values, row, 1, keepdims=False)
