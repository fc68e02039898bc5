"""Signal handlers that stop the CLI on SIGINT or SIGTERM, so that it reports the written files.

Importing JAX takes seconds and happens before the CLI's `main`, so the package imports this module
first. In a process that runs the `jaxpersona` command, this import installs the handlers. Other
processes are unaffected.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []  # the last signal number that `_stop` handled, if any
Action = Callable[[int, FrameType | None], object]
Handlers = dict[signal.Signals, Action | int | None]  # an int is SIG_DFL or SIG_IGN


class Stopped(BaseException):
    """Raised when a signal stops the command.

    This class is not a subclass of KeyboardInterrupt, because the CLI library handles that
    exception itself.

    Attributes:
      code: the exit code, 128 + the signal number.
      kept: a description of the files written so far.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number
        self.kept = "nothing was written"


def is_command() -> bool:
    """Return whether this process runs `jaxpersona` or `python -m jaxpersona.cli`."""
    argv = getattr(sys, "orig_argv", [])
    module = any(pair == ("-m", "jaxpersona.cli") for pair in zip(argv, argv[1:], strict=False))
    return module or pathlib.PurePath(sys.argv[0] if sys.argv else "").stem == "jaxpersona"


def _leave(number: int, _: FrameType | None) -> None:
    os.write(2, b"stopped; nothing was written\n")
    os._exit(128 + number)  # during imports, there is nothing to clean up


def _stop(number: int, _: FrameType | None) -> None:
    for each in _SIGNALS:  # a second signal exits without cleanup
        if signal.getsignal(each) is _stop:
            signal.signal(each, _leave_at_once)
    _received[:] = [number]
    raise Stopped(number)


def check() -> None:
    """Raise `Stopped` again if a signal has arrived.

    Python discards an exception that a signal handler raises during a finalizer or a callback of
    the garbage collector. Long jobs therefore call this function at every progress report. The
    function has no effect outside the main thread.

    Raises:
      Stopped: a signal arrived during the current `raised` block.
    """
    if _received and threading.current_thread() is threading.main_thread():
        raise Stopped(_received[0])


def _leave_at_once(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def _handle(action: Action) -> Handlers:
    """Install `action` as the handler of SIGINT and SIGTERM; return the replaced handlers.

    A signal that is ignored stays ignored. Outside the main thread, no handler is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    installed = ((number, signal.getsignal(number)) for number in _SIGNALS)
    before: Handlers = {number: old for number, old in installed if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, action)
    return before


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise `Stopped` on SIGINT or SIGTERM while the block runs, or at its end (see `check`)."""
    before = _handle(_stop)
    try:
        yield
        check()
    finally:
        _received.clear()
        for number, old in before.items():
            # the command may have written files, so `_leave`'s message could be wrong
            old = _leave_at_once if old is _leave else old
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextlib.contextmanager
def intercepted(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` on SIGINT while the block runs, in place of the current handler.

    The handler of SIGTERM is unchanged. Outside the main thread, or if SIGINT is ignored, this
    context manager has no effect.
    """
    number = signal.SIGINT
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(number, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def keeping(describe: Callable[[], str]) -> Iterator[None]:
    """If a signal stops the block, set `Stopped.kept` to `describe()` and re-raise `Stopped`."""
    try:
        yield
    except Stopped as stop:
        stop.kept = "the state of the output files is unknown"
        with contextlib.suppress(OSError):  # if `describe` fails, keep the description above
            stop.kept = describe()
        raise


if is_command():
    _handle(_leave)
