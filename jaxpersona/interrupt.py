"""End the command on SIGINT and SIGTERM with one line that says what is kept.

Importing JAX takes seconds, and the package is imported before the command's `main` begins. The
package therefore imports this module first; where the process is the command `jaxpersona`, it
handles both signals from then on. In any other program nothing is changed.
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
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the command to stop.

    No subclass of KeyboardInterrupt: the command-line library exits on that one by itself.

    Attributes:
      code: the exit code, 128 and the signal's number.
      kept: what the command has written so far, in words.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number
        self.kept = "nothing was written"


def is_command() -> bool:
    """Whether this process is the command: `jaxpersona`, or `python -m jaxpersona.cli`."""
    given = getattr(sys, "orig_argv", [])
    module = any(pair == ("-m", "jaxpersona.cli") for pair in zip(given, given[1:], strict=False))
    return module or pathlib.PurePath(sys.argv[0] if sys.argv else "").stem == "jaxpersona"


def _leave(number: int, _: FrameType | None) -> None:
    os.write(2, b"stopped; nothing was written\n")
    os._exit(128 + number)  # in the middle of an import nothing needs to be closed


def _stop(number: int, _: FrameType | None) -> None:
    for each in _SIGNALS:  # a second signal does not wait for anything to be closed
        if signal.getsignal(each) is _stop:
            signal.signal(each, _leave_at_once)
    raise Stopped(number)


def _leave_at_once(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def _handle(action: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Let `action` handle both signals, unless the caller of the process ignores them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: held for number, held in before.items() if held is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, action)
    return before


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise `Stopped` on either signal while the block runs."""
    before = _handle(_stop)
    try:
        yield
    finally:
        for number, held in before.items():
            # once the command has run, the words of `_leave` may be wrong
            held = _leave_at_once if held is _leave else held
            signal.signal(number, signal.SIG_DFL if held is None else held)


@contextlib.contextmanager
def keeping(describe: Callable[[], str]) -> Iterator[None]:
    """Say with `describe` what is kept when a signal stops the block."""
    try:
        yield
    except Stopped as stop:
        stop.kept = "nothing is known of its files"
        with contextlib.suppress(OSError):  # then that is what there is to say
            stop.kept = describe()
        raise


if is_command():
    _handle(_leave)
