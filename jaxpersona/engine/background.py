"""A background thread that runs the steps of an engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from jaxpersona.errors import UserError


class Background:
    """A thread that runs steps within a `with` block (`running`).

    When the block ends, the thread completes its current step and exits, even if the caller's wait
    for the thread is interrupted. `active` is True until the thread has exited.
    """

    def __init__(self, changed: threading.Condition, unfinished: Callable[[], bool],
                 step: Callable[[], object]) -> None:
        """Store the functions; `running` starts the thread.

        Args:
          changed: the condition that is notified of new requests; it is also notified when the
            thread ends.
          unfinished: a function that returns whether there are unfinished requests.
          step: a function that runs one step. If it raises an error, it must already have passed
            the error to the requests; the thread continues.
        """
        self._changed, self._unfinished, self._step = changed, unfinished, step
        self._stop: threading.Event | None = None  # set when the block ends; None without a thread

    @property
    def active(self) -> bool:
        """Whether a thread runs the steps."""
        return self._stop is not None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run steps in a thread within a `with` block.

        Raises:
          UserError: a thread already runs the steps, and its block has not ended.
        """
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(stop,), name="jaxpersona-engine",
                                  daemon=True)
        try:
            with self._changed:
                # the thread of an earlier block may still run if the wait for it was interrupted
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stop is None or not self._stop.is_set())
                if self._stop is not None:
                    raise UserError("the engine already runs in the background; leave its "
                                    "`with engine.running()` block first")
                self._stop = stop
            thread.start()
            yield
        finally:
            stop.set()
            with self._changed:
                if thread.ident is None:  # not started
                    self._ended(stop)
                self._changed.notify_all()
            if thread.ident is not None:
                thread.join()

    def _run(self, stop: threading.Event) -> None:
        """Run steps when there are unfinished requests, until the `with` block ends."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: stop.is_set() or self._unfinished())
                    if stop.is_set():
                        return
                try:
                    self._step()
                except BaseException:  # the step has passed this error to the requests
                    continue
        finally:
            self._ended(stop)

    def _ended(self, stop: threading.Event) -> None:
        """Record that the thread with this stop event has ended, and notify all waiting threads."""
        with self._changed:
            if self._stop is stop:
                self._stop = None
            self._changed.notify_all()
