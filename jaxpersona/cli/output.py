"""Print text with escapes for control characters and for characters that the encoding lacks."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxpersona.inputs import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def say(*lines: object, error: bool = False) -> None:
    """Print lines, with control characters escaped (`inputs.printable`)."""
    for line in lines:
        print(printable(line), file=sys.stderr if error else sys.stdout)


def write(text: str) -> None:
    """Print a piece of streamed text immediately, with control characters escaped."""
    print(printable(text), end="", flush=True)


def cell(text: object) -> Text:
    """Return a rich text in which control characters are escaped and markup is not interpreted."""
    from rich.text import Text

    return Text(printable(text))


def heading(text: object) -> str:
    """Return a text for a table's header, with markup and control characters escaped."""
    from rich.markup import escape

    return escape(printable(text))


def console(error: bool = False) -> Console:
    """Return a console on standard output, or on standard error."""
    from rich.console import Console

    return Console(stderr=error)


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Let standard output and error accept every character, and print each warning as one line.

    Characters that the console's encoding lacks are written as escapes, such as \\u2028.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not if the caller has replaced the stream
            with contextlib.suppress(ValueError):  # the stream was detached or closed
                stream.reconfigure(errors="backslashreplace")
    shown = warnings.showwarning

    def show(message: Warning | str, *_: object, **__: object) -> None:
        say(f"warning: {' '.join(str(message).split())}", error=True)

    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown
