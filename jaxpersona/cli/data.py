"""The commands of `jaxpersona data`: check, show and export the roles, questions and traits."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from jaxpersona.cli.output import say

app = typer.Typer(no_args_is_help=True, help="Check, show and export roles, questions, traits.")


@app.command()
def check(
    folder: Annotated[
        pathlib.Path | None, typer.Argument(help="A folder of texts; without one, our own.")
    ] = None,
) -> None:
    """Read every text and name all faults at once."""
    from jaxpersona.data.export import check_data

    say(*check_data(folder))


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="role, question, trait or drift.")],
    name: Annotated[str | None, typer.Argument(help="Which; without it, all are listed.")] = None,
) -> None:
    """Print one text, or the names of a kind."""
    from jaxpersona.data import export

    say(export.show(kind, name))


@app.command()
def export(
    folder: Annotated[pathlib.Path, typer.Argument(help="A new or an empty folder.")],
) -> None:
    """Write our texts into a folder, to be read, changed and given back with --roles."""
    from jaxpersona.data.export import export as write

    say(f"{write(folder)} files in {folder}")
