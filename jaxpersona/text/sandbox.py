"""Render chat templates with bounds on time, memory and size.

One process renders for all tokenizers (`sandbox_worker`). It starts with the first rendering and
again after a template has ended it.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

SECONDS = 10.0  # of processor time for one rendering, and for all those of one conversation
MEMORY = 2 << 30  # bytes of address space, Python's own included
CHARACTERS = 1 << 26  # of a conversation and of a rendering
_LARGEST_REPLY = 6 * CHARACTERS + (1 << 16)  # bytes; JSON writes a character in at most six
_WAIT = 10  # times SECONDS by the clock, for a machine that does much else
_START = 120.0  # seconds by the clock for the process to start


class Refused(ValueError):
    """The template refuses the conversation, by its own words or by an error within it."""


_budget: contextvars.ContextVar[list[float] | None] = contextvars.ContextVar(
    "jaxpersona_renderings", default=None)  # one number: the processor seconds left


@contextlib.contextmanager
def one_conversation() -> Iterator[None]:
    """Bound the renderings of a `with` block together by `SECONDS`; an inner block adds nothing."""
    if _budget.get() is not None:
        yield
        return
    token = _budget.set([SECONDS])
    try:
        yield
    finally:
        _budget.reset(token)


def render(template: str, variables: Mapping[str, Any], source: str = "") -> str:
    """Render a template.

    Args:
      template: Jinja source.
      variables: what it is rendered with; JSON values.
      source: where the template comes from, for messages.

    Raises:
      Refused: the template raises an error.
      ValueError: it exceeds a limit, a variable is no JSON value, or no process can be started.
    """
    request = _encoded({"template": template, "variables": dict(variables)})
    left = _budget.get()
    if left is not None and left[0] <= 0:
        reply = {"error": "the renderings of one conversation take more than "
                          f"{SECONDS:g} s together", "refused": False}
    else:
        with _lock:
            reply = _worker().ask(request)
    if left is not None:
        left[0] -= reply.get("seconds", 0.0)
    if "text" in reply:
        return reply["text"]
    reason = " ".join(str(reply["error"]).split()) + (f" ({source})" if source else "")
    if reply["refused"]:
        raise Refused(f"the chat template refuses the conversation: {reason}")
    raise ValueError(f"the chat template cannot be rendered: {reason}; use another template "
                     "(`tokenizer.chat_template`)")


def _encoded(message: Any) -> bytes:
    """Return a message of the protocol.

    Raises:
      ValueError: a variable that is no JSON value, or more characters than `CHARACTERS`.
    """
    try:
        text = json.dumps(message, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        for name, value in message.get("variables", {}).items():
            try:
                json.dumps(value, default=_plain)
            except (TypeError, ValueError, RecursionError):
                raise ValueError(f"the template variable {name!r} is {value!r:.60}; give text, "
                                 "numbers, booleans, None, lists or dictionaries") from None
        raise ValueError(f"the template variables are no JSON values ({error})") from None
    if len(text) > CHARACTERS:
        raise ValueError(f"the conversation has {len(text):,} characters; the limit is "
                         f"{CHARACTERS:,}: shorten it")
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def _plain(value: Any) -> Any:
    """Return numbers of NumPy as Python's and added tokens as their text."""
    if type(value).__module__.split(".")[0] == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if type(value).__name__ == "AddedToken":
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


class _Worker:
    """A running process and its two pipes."""

    def __init__(self) -> None:
        self.limits = (SECONDS, MEMORY, CHARACTERS)
        script = pathlib.Path(__file__).with_name("sandbox_worker.py")
        import jinja2
        import markupsafe

        folders = {str(pathlib.Path(str(m.__file__)).parents[1]) for m in (jinja2, markupsafe)}
        # -P: neither the script's folder nor the current one may hide a module of Python's
        code = ("import runpy, sys; sys.path += sys.argv[2:]; "
                "runpy.run_path(sys.argv[1], run_name='__main__')")
        try:
            self.process = subprocess.Popen(
                [sys.executable or "python3", "-P", "-c", code, str(script), *sorted(folders)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise ValueError("the process that renders chat templates cannot be started "
                             f"({error})") from None
        assert self.process.stdin is not None and self.process.stdout is not None
        self.sink, self.source = self.process.stdin, self.process.stdout
        ready = self.ask(_encoded({"seconds": SECONDS, "memory": MEMORY,
                                   "characters": CHARACTERS}), _START)
        if "ready" not in ready:
            raise ValueError("the process that renders chat templates cannot be started "
                             f"({ready['error']}); {sys.executable} must be a Python with jinja2")

    def ask(self, request: bytes, wait: float | None = None) -> dict[str, Any]:
        """Send a request and return the answer; the process is ended if that fails."""
        wait = _WAIT * self.limits[0] if wait is None else wait
        try:
            self.sink.write(request)
            self.sink.flush()
            head = self._read(8, wait)
            size = int.from_bytes(head, "little")
            if size > _LARGEST_REPLY:  # no answer of the worker's own
                raise EOFError
            reply = self._read(size, wait)
        except (OSError, EOFError, TimeoutError) as error:
            self.end()
            return {"error": self._cause(error), "refused": False}
        except BaseException:  # an interrupt: the answer would be taken for the next request's
            self.end()
            raise
        return json.loads(reply.decode("utf-8", "surrogatepass"))

    def _read(self, size: int, wait: float) -> bytes:
        """Read so many bytes within `wait` seconds by the clock."""
        if os.name != "posix":  # pipes cannot be polled there
            timer = threading.Timer(wait, self.process.kill)
            timer.start()
            try:
                data = self.source.read(size)
            finally:
                timer.cancel()
            if len(data) < size:
                raise EOFError
            return data
        parts, left, end = [], size, time.monotonic() + wait
        with selectors.DefaultSelector() as selector:
            selector.register(self.source, selectors.EVENT_READ)
            while left:
                if not selector.select(max(end - time.monotonic(), 0)):
                    raise TimeoutError
                part = os.read(self.source.fileno(), min(left, 1 << 20))
                if not part:
                    raise EOFError
                parts.append(part)
                left -= len(part)
        return b"".join(parts)

    def _cause(self, error: BaseException) -> str:
        code = self.process.returncode
        spent = code is not None and code == -getattr(signal, "SIGPROF", 0)
        if spent or isinstance(error, TimeoutError):
            return f"it runs for more than {self.limits[0]:g} s"
        return f"its process ended with code {code}"

    def end(self) -> None:
        """End the process and close its pipes."""
        global _current
        if _current is self:
            _current = None
        if self.process.poll() is None and isinstance(sys.exc_info()[1], EOFError | OSError):
            try:  # it is about to end by itself, and its code says why
                self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                pass
        self.process.kill()
        self.process.wait()
        for pipe in (self.sink, self.source):
            try:
                pipe.close()
            except OSError:  # what was not sent cannot be flushed any more
                pass


_lock = threading.Lock()
_current: _Worker | None = None
_inherited: list[_Worker] = []  # of a parent process: kept, so that nothing ends or awaits them


def _worker() -> _Worker:
    """Return the running process, or start one."""
    global _current
    if _current is not None and (
        _current.limits != (SECONDS, MEMORY, CHARACTERS) or _current.process.poll() is not None
    ):
        _current.end()
    if _current is None:
        _current = _Worker()
    return _current


def _forget() -> None:
    """Leave the process to the parent, in a process that was forked."""
    global _current, _lock
    if _current is not None:
        _inherited.append(_current)
    _current, _lock = None, threading.Lock()


def _close() -> None:
    if _current is not None:
        _current.end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_close)
