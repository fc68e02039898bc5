"""Print text with control characters and unencodable characters escaped."""

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
    """Print each value on a line, with control characters escaped (`inputs.printable`).

    The text is printed to standard output or, if `error` is True, to standard error.
    """
    for line in lines:
        print(printable(line), file=sys.stderr if error else sys.stdout)


def write(text: str) -> None:
    """Print a piece of streamed text immediately, with control characters escaped."""
    print(printable(text), end="", flush=True)


def cell(text: object) -> Text:
    """Return text for a table cell, with control characters escaped; markup is shown literally."""
    from rich.text import Text

    return Text(printable(text))


def heading(text: object) -> str:
    """Return text for a table header, with control characters and markup escaped."""
    from rich.markup import escape

    return escape(printable(text))


def console(error: bool = False) -> Console:
    """Return a console for standard output or, if `error` is True, for standard error."""
    from rich.console import Console

    return Console(stderr=error)


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Configure the standard streams for a command; print warnings as lines on standard error.

    Characters that the encoding of a stream cannot represent are printed as escape sequences, such
    as \\u2028. The format of warnings is restored at the end of the `with` block.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the caller may have replaced the stream
            with contextlib.suppress(ValueError):  # the stream may be detached or closed
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
