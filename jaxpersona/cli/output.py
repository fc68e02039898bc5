"""What the command prints: no control character of a file, and nothing lost to the encoding."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from jaxpersona.inputs import printable


def say(*lines: object, error: bool = False) -> None:
    """Print lines; control characters in them are written out (`inputs.printable`)."""
    for line in lines:
        print(printable(line), file=sys.stderr if error else sys.stdout)


def cell(text: object) -> Any:
    """Return a text for a table or a console: no markup and no control character acts in it."""
    from rich.text import Text

    return Text(printable(text))


def heading(text: object) -> str:
    """Return a text for a table's head, which takes markup alone."""
    from rich.markup import escape

    return escape(printable(text))


def console(error: bool = False) -> Any:
    """Return a console on standard output, or on standard error."""
    from rich.console import Console

    return Console(stderr=error)


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Make standard output and error write every character, and a warning one line.

    A character that the console's encoding lacks is written as an escape, such as \\u2028.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream of another program's
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore
    shown = warnings.showwarning

    def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
        say(f"warning: {' '.join(str(message).split())}", error=True)

    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown
