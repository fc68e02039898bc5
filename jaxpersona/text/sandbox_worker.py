"""Worker process that renders chat templates; `sandbox` runs this file as a script.

Chat templates are untrusted programs. This process renders them in Jinja's sandbox and, except on
Windows, with operating system limits on memory and CPU time. A template that exceeds a limit can
end only this process. The Jinja environment behaves like the one in transformers.

Protocol: a message is JSON in UTF-8, preceded by its length in bytes (8 bytes, little endian). The
first message on stdin contains the limits; the answer on stdout is {"ready": true}. Each later
message is a request; the answer is {"text": …} or {"error": …, "refused": bool}, with two more
fields: "seconds" is the CPU time used, and "varies" is true if the template used the clock or
random numbers, so that the answers to equal requests may differ.

For a fast start, this file imports only Jinja and the standard library.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
import time
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils


class Generation(jinja2.ext.Extension):
    """Jinja extension that renders the content of `{% generation %}` blocks unchanged."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """Parse a `generation` block into a node that renders its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_same")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
        return caller()


class Table:
    """The template global `dict`, restricted to the constructor and `fromkeys`."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return `dict.fromkeys(*args)`."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """The template global `namespace`, restricted to names without a leading underscore."""

    def __init__(*args: Any, **fields: Any) -> None:  # noqa: B902 - a field can be named "self"
        self, args = args[0], args[1:]
        values = dict(*args, **fields)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed; "
                                               "omit the leading underscore")


_varies = False  # whether the current rendering used the clock or random numbers


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Create the Jinja environment for chat templates."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def varying(function: Any) -> Any:
        @functools.wraps(function)  # keeps the attributes that Jinja sets on the function
        def call(*args: Any, **fields: Any) -> Any:
            global _varies
            _varies = True
            return function(*args, **fields)

        return call

    env.filters["tojson"] = tojson
    env.filters["random"] = varying(env.filters["random"])
    env.globals |= {
        "raise_exception": raise_exception, "dict": Table(), "namespace": Namespace,
        "strftime_now": varying(lambda form: datetime.now().strftime(form)),
        "lipsum": varying(env.globals["lipsum"]),
    }
    return env


def limit_process(memory: int) -> None:
    """Limit this process's address space to `memory` bytes; forbid file writes and core dumps."""
    try:
        import resource
    except ImportError:  # on Windows, only the caller's timeout applies
        return
    for name, most in (("RLIMIT_AS", memory), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            hard = resource.getrlimit(getattr(resource, name))[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(getattr(resource, name), (most, most))


def limit_time(seconds: float) -> None:
    """Kill this process after `seconds` of CPU time; 0 disables the limit."""
    if hasattr(signal, "setitimer"):  # SIGPROF kills the process without running Python code
        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(request: dict[str, Any], known: dict[str, Any],
           limits: dict[str, Any]) -> dict[str, Any]:
    """Render the template of a request and return the answer.

    Args:
      request: the Jinja source ("template") and the template variables by name ("variables").
      known: a cache of one compiled template, keyed by its source.
      limits: the limits of a rendering: "memory" in bytes, and "characters".
    """
    source = request["template"]
    try:
        if source not in known:
            known.clear()
            known[source] = environment().from_string(source)
        text = known[source].render(**request["variables"])
    except MemoryError:
        return {"error": f"rendering needs more than {limits['memory'] >> 20} MiB of memory",
                "refused": False}
    except RecursionError:
        return {"error": "infinite recursion", "refused": False}
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error), "refused": True}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "refused": True}
    if len(text) > limits["characters"]:
        return {"error": f"the rendering has {len(text):,} characters; the limit is "
                         f"{limits['characters']:,}", "refused": False}
    return {"text": text}


def read(stream: BinaryIO) -> Any:
    """Read one message; return None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return json.loads(stream.read(int.from_bytes(head, "little")).decode("utf-8", "surrogatepass"))


def write(stream: BinaryIO, message: Any) -> None:
    """Write one message and flush the stream."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def main() -> None:
    """Read the limits from stdin, then answer requests until stdin ends."""
    global _varies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles interrupts
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    limits = read(source)
    if limits is None:
        return
    limit_process(limits["memory"])
    known: dict[str, Any] = {}
    write(sink, {"ready": True})
    while (request := read(source)) is not None:
        limit_time(limits["seconds"])
        begun, _varies = time.process_time(), False
        try:
            reply = answer(request, known, limits)
            reply |= {"seconds": time.process_time() - begun, "varies": _varies}
            if "error" in reply:
                reply["error"] = reply["error"][:2000]
        finally:
            limit_time(0)
        write(sink, reply)


if __name__ == "__main__":
    main()
