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
        pathlib.Path | None, typer.Argument(help="A folder of texts; default: the package's own.")
    ] = None,
) -> None:
    """Check every text and list all errors."""
    from jaxpersona.data.export import check_data

    say(*check_data(folder))


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="role, question, trait or drift.")],
    name: Annotated[str | None, typer.Argument(help="Its name or id; default: list all.")] = None,
) -> None:
    """Print one text, or list all of a kind."""
    from jaxpersona.data import export

    say(export.show(kind, name))


@app.command()
def export(
    folder: Annotated[pathlib.Path, typer.Argument(help="A new or an empty folder.")],
) -> None:
    """Write the package's texts to a folder, to be edited and passed to `axis --roles`."""
    from jaxpersona.data.export import export as write

    say(f"{write(folder)} files in {folder}")
