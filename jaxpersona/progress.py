"""Progress display of slow functions, and the argument that controls it.

The argument is named `progress` or `report`. By default (None or True), a call that takes longer
than `SECONDS` shows its progress on standard error: on a terminal and in a notebook as one line
that is rewritten, otherwise as a new line every `EVERY` seconds. With False, nothing is shown. If
the argument is a function, nothing is shown either, and the function is called with the current
progress, such as the numbers of finished and of all items.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from jaxpersona.brief import shown
from jaxpersona.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
State = tuple[str, int, int, str]  # (step, number done, total number, note)

SECONDS = 3.0  # seconds before progress is shown
EVERY = 30.0  # seconds between lines if standard error is not a terminal
_REWRITE = 0.5  # seconds between two versions of the line on a terminal
# exceptions raised if standard error is closed, is None, or lacks methods of a stream
_NO_STREAM = (OSError, ValueError, AttributeError)
_lock = threading.Lock()
_muted = 0  # the number of running functions that suppress other displays


def _forked() -> None:
    """Replace the lock in a forked child, because a thread of the parent may hold it forever."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Show no progress within the block, for example in a command with its own display."""
    global _muted
    with _lock:
        _muted += 1
    try:
        yield
    finally:
        with _lock:
            _muted -= 1


def shows(read: Callable[..., State], argument: str = "progress",
          ) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for functions whose argument for progress is a function or None.

    The decorated function also accepts True and False, and raises a UserError for any other value.

    Args:
      read: a function that converts the arguments of a call of the progress function to a `State`.
      argument: the name of the function's argument, which must be a keyword-only argument.
    """
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **named: P.kwargs) -> R:
            given: Any = named.get(argument)
            if not (given is None or isinstance(given, bool) or callable(given)):
                raise UserError(f"{argument} is {shown(given, 40)}; give True (the default), "
                                "False to show nothing, or a function")
            display = None
            if (given is None or given is True) and not _muted:
                display = _Display(function.__name__, read)
                given = display.tell
            named[argument] = given if callable(given) else None
            with muted(), display or contextlib.nullcontext():
                return function(*args, **named)

        return call

    return decorate


class _Display:
    """A context manager that shows the latest state from a thread, after `SECONDS`."""

    def __init__(self, name: str, read: Callable[..., State]) -> None:
        self._name, self._read, self._state = name, read, ("", 0, 0, "")
        self._begun: dict[str, tuple[float, int]] = {}
        self._ended, self._width = threading.Event(), 0
        self._thread = threading.Thread(target=self._show, daemon=True, name="progress")

    def tell(self, *numbers: Any) -> None:
        """Store the arguments of a call of the progress function."""
        state = self._read(*numbers)
        self._begun.setdefault(state[0], (time.perf_counter(), state[1]))
        self._state = state

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _show(self) -> None:
        if self._ended.wait(SECONDS):
            return
        from jaxpersona.distributed import processes

        # `joined` first: a single process must not initialize JAX's backend for a display
        if processes.joined() and not processes.first():
            return
        rewritten = _rewrites()
        while True:
            with contextlib.suppress(*_NO_STREAM):
                self._write(self._text(), rewritten)
            if self._ended.wait(_REWRITE if rewritten else EVERY):
                break
        if rewritten:
            with contextlib.suppress(*_NO_STREAM):
                self._write("", True)
                sys.stderr.write("\r")
                sys.stderr.flush()

    def _text(self) -> str:
        step, done, total, note = self._state
        now = time.perf_counter()
        if not total:
            return f"{self._name} is running, {now - self._start:.0f} s" + (
                f", {note}" if note else "")
        parts = [f"{step} {done:,}/{total:,}", note, f"{now - self._start:.0f} s"]
        begun, first = self._begun[step]
        if first < done < total:
            parts.append(f"about {(now - begun) / (done - first) * (total - done):.0f} s left")
        return ", ".join(part for part in parts if part)

    def _write(self, text: str, rewritten: bool) -> None:
        out = sys.stderr
        out.write("\r" + text.ljust(self._width) if rewritten else text + "\n")
        self._width = len(text)
        out.flush()


def _rewrites() -> bool:
    """Return whether a line on standard error can be rewritten: in a terminal or a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    with contextlib.suppress(*_NO_STREAM):
        return sys.stderr.isatty() or type(shell).__name__ == "ZMQInteractiveShell"
    return False


def tokens(step: str) -> Callable[[int, int, int], State]:
    """Return a function that converts (done, total, tokens) to a `State` of the given step."""
    return lambda done, total, count: (step, done, total, f"{count:,} tokens" if count else "")


def steps(step: str, done: int, total: int, count: int) -> State:
    """Convert the arguments (step, done, total, tokens) of a progress function to a `State`."""
    return step, done, total, f"{count:,} tokens" if count else ""


def megabytes(done: int, total: int) -> State:
    """Convert the arguments (bytes read, total bytes) of a progress function to a `State`."""
    return "load (MB)", done // 1_000_000, max(1, total // 1_000_000), ""
