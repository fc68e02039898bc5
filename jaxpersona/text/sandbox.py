"""Render chat templates in a subprocess with limits on time, memory, input and output size.

One worker process (`sandbox_worker`) renders the templates of all tokenizers. It starts at the
first rendering and is restarted after a rendering that exceeds the time limit or crashes the
process. Short renderings that depend only on the request are cached, because `template.locate`
renders each conversation several times, and most of these renderings are the same for all
conversations with the same structure.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import json
import os
import pathlib
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from jaxpersona.brief import shown
from jaxpersona.errors import UserError

SECONDS = 10.0  # limit on the CPU seconds of a rendering, and of all renderings of a conversation
MEMORY = 2 << 30  # maximum size of the worker's address space in bytes, including the interpreter
CHARACTERS = 1 << 26  # maximum length of a request (with the template) and of a rendering
# a character takes up to six bytes in an answer
_LARGEST_REPLY = 6 * CHARACTERS + (1 << 16)  # maximum size of an answer in bytes
_WAIT = 10  # wall-clock timeout for an answer in multiples of SECONDS (large, for busy machines)
_START = 120.0  # wall-clock timeout in seconds for the start of the process
_CACHED = 256  # maximum number of cached renderings
# maximum size of a cached request (with its template) in bytes, and of its text in characters
_CACHED_BYTES = 1 << 15


class Refused(UserError):
    """Raised if a chat template raises an error, for example to reject a conversation."""


_budget: contextvars.ContextVar[list[float] | None] = contextvars.ContextVar(
    "jaxpersona_renderings", default=None)  # a list with one item, the remaining CPU seconds


@contextlib.contextmanager
def one_conversation() -> Iterator[None]:
    """Limit the total CPU time of the renderings in this and nested `with` blocks to `SECONDS`."""
    if _budget.get() is not None:
        yield
        return
    token = _budget.set([SECONDS])
    try:
        yield
    finally:
        _budget.reset(token)


def render(template: str, variables: Mapping[str, Any], source: str = "") -> str:
    """Render a template and return the text.

    Args:
      template: the Jinja source.
      variables: the template variables by name; the values must be JSON-serializable.
      source: the name of the template's tokenizer, for error messages.

    Raises:
      Refused: the template raises an error.
      UserError: a limit is exceeded, a variable is not JSON-serializable, the text contains a lone
        surrogate, or the worker cannot start or crashes.
    """
    request = _encoded({"template": template, "variables": dict(variables)})
    left = _budget.get()
    if left is not None and left[0] <= 0:
        reply = {"error": "the renderings of one conversation take more than "
                          f"{SECONDS:g} s in total", "refused": False}
    else:
        with _lock:
            reply = _answer(request)
    if left is not None:
        left[0] -= reply.get("seconds", 0.0)
    if "text" in reply and not re.search("[\ud800-\udfff]", reply["text"]):
        return reply["text"]
    error = reply.get("error", "its text contains a lone surrogate, which is invalid Unicode")
    reason = " ".join(str(error).split()) + (f" ({source})" if source else "")
    if reply.get("refused"):
        raise Refused(f"the chat template rejects the conversation: {reason}")
    raise UserError(f"the chat template cannot be rendered: {reason}; use another template "
                    "(`tokenizer.chat_template`)")


def _answer(request: bytes) -> dict[str, Any]:
    """Return the answer to an encoded request, from the cache if possible.

    The caller must hold `_lock`.

    Rendered texts and template errors are cached if request and answer are short. Answers that
    depend on the time or on random numbers ("varies"), and errors about limits, are not cached.
    """
    if request in _cache:
        _cache.move_to_end(request)
        return _cache[request]
    reply = _worker().ask(request)
    keep = ("text" in reply or reply["refused"]) and not reply.get("varies", True)
    if keep and max(len(request), len(reply.get("text", ""))) <= _CACHED_BYTES:
        _cache[request] = {**reply, "seconds": 0.0}
        while len(_cache) > _CACHED:
            _cache.popitem(last=False)
    return reply


def _encoded(message: Any) -> bytes:
    """Encode a protocol message.

    Raises:
      UserError: a variable is not JSON-serializable, or the message is longer than `CHARACTERS`.
    """
    try:
        text = json.dumps(message, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        for name, value in message.get("variables", {}).items():
            try:
                json.dumps(value, default=_plain)
            except (TypeError, ValueError, RecursionError):
                raise UserError(f"the template variable {name!r} is {shown(value, 60)}; use "
                                "strings, numbers, booleans, None, lists or dicts") from None
        raise UserError(f"the template variables are not JSON-serializable ({error}); use strings, "
                        "numbers, booleans, None, lists or dicts") from None
    if len(text) > CHARACTERS:
        raise UserError(f"the conversation and its template have {len(text):,} characters, but the "
                        f"limit is {CHARACTERS:,}; shorten the conversation")
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def _plain(value: Any) -> Any:
    """Convert a NumPy value to Python values, or an `AddedToken` to a string."""
    if type(value).__module__.split(".")[0] == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if type(value).__name__ == "AddedToken":
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON-serializable")


class _Worker:
    """A running worker process and its two pipes."""

    def __init__(self) -> None:
        self.limits = (SECONDS, MEMORY, CHARACTERS)
        script = pathlib.Path(__file__).with_name("sandbox_worker.py")
        import jinja2
        import markupsafe

        folders = {str(pathlib.Path(str(m.__file__)).parents[1]) for m in (jinja2, markupsafe)}
        # -P prevents files in the script's or the current folder from shadowing standard modules
        code = ("import runpy, sys; sys.path += sys.argv[2:]; "
                "runpy.run_path(sys.argv[1], run_name='__main__')")
        try:
            self.process = subprocess.Popen(
                [sys.executable or "python3", "-P", "-c", code, str(script), *sorted(folders)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise UserError("the process that renders chat templates could not be started "
                            f"({error})") from None
        assert self.process.stdin is not None and self.process.stdout is not None
        self.sink, self.source = self.process.stdin, self.process.stdout
        ready = self.ask(_encoded({"seconds": SECONDS, "memory": MEMORY,
                                   "characters": CHARACTERS}), _START)
        if "ready" not in ready:
            raise UserError("the process that renders chat templates could not be started "
                            f"({ready['error']}); install jinja2 for {sys.executable}")

    def ask(self, request: bytes, wait: float | None = None) -> dict[str, Any]:
        """Send a request; return the answer, or kill the process on failure and return an error."""
        wait = _WAIT * self.limits[0] if wait is None else wait
        try:
            self.sink.write(request)
            self.sink.flush()
            head = self._read(8, wait)
            size = int.from_bytes(head, "little")
            if size > _LARGEST_REPLY:  # too large for a valid answer
                raise EOFError
            reply = self._read(size, wait)
        except (OSError, EOFError, TimeoutError) as error:
            self.end()
            return {"error": self._cause(error), "refused": False}
        except BaseException:  # e.g. an interrupt: the next request must not read this answer
            self.end()
            raise
        return json.loads(reply.decode("utf-8", "surrogatepass"))

    def _read(self, size: int, wait: float) -> bytes:
        """Read exactly `size` bytes within `wait` wall-clock seconds.

        Raises:
          EOFError: the process exited or, on Windows, was killed at the timeout.
          TimeoutError: the timeout expired (not on Windows).
        """
        if os.name != "posix":  # Windows cannot poll pipes
            timer = threading.Timer(wait, self.process.kill)
            timer.start()
            try:
                data = self.source.read(size)
            finally:
                timer.cancel()
            if len(data) < size:
                raise EOFError
            return data
        chunks, left, end = [], size, time.monotonic() + wait
        with selectors.DefaultSelector() as selector:
            selector.register(self.source, selectors.EVENT_READ)
            while left:
                if not selector.select(max(end - time.monotonic(), 0)):
                    raise TimeoutError
                chunk = os.read(self.source.fileno(), min(left, 1 << 20))
                if not chunk:
                    raise EOFError
                chunks.append(chunk)
                left -= len(chunk)
        return b"".join(chunks)

    def _cause(self, error: BaseException) -> str:
        code = self.process.returncode
        spent = code is not None and code == -getattr(signal, "SIGPROF", 0)
        if spent or isinstance(error, TimeoutError):
            return f"rendering takes more than {self.limits[0]:g} s"
        return f"the worker process exited with code {code}"

    def end(self) -> None:
        """Kill the process and close its pipes."""
        global _current
        if _current is self:
            _current = None
        if self.process.poll() is None and isinstance(sys.exc_info()[1], EOFError | OSError):
            # if the worker is about to exit, its exit code identifies the cause
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
        self.process.kill()
        self.process.wait()
        for pipe in (self.sink, self.source):
            # `close` closes the pipe even if flushing data to the dead process fails
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


_lock = threading.Lock()
_cache: OrderedDict[bytes, dict[str, Any]] = OrderedDict()  # answers by request
_current: _Worker | None = None
_inherited: list[_Worker] = []  # workers of the parent process, never finalized in this process


def _worker() -> _Worker:
    """Return the running worker; start one if none is running or the limits have changed."""
    global _current
    if _current is not None and (
        _current.limits != (SECONDS, MEMORY, CHARACTERS) or _current.process.poll() is not None
    ):
        _current.end()
    if _current is None:
        _current = _Worker()
    return _current


def _forget() -> None:
    """Drop the parent's worker and create a new lock; called in a forked process."""
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
