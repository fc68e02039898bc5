"""The commands of `jaxpersona data`: check, show and export the roles, questions and traits."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from jaxpersona.cli.output import say

app = typer.Typer(no_args_is_help=True, help="Check, show and export roles, questions and traits; "
                                             "explain their file formats.")


@app.command()
def check(
    folder: Annotated[
        pathlib.Path | None, typer.Argument(
            show_default="the package data",
            help="A folder with any of roles/, questions.jsonl, traits/ and drift/.")
    ] = None,
) -> None:
    """Check every text and list all errors."""
    from jaxpersona.data.export import check_data

    say(*check_data(folder))


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="role, question, trait or drift.")],
    name: Annotated[str | None, typer.Argument(
        show_default="list all", help="The name or id of an entry.")] = None,
) -> None:
    """Print one entry of the package data, or list all entries of a kind."""
    from jaxpersona.data import export

    say(export.show(kind, name))


@app.command("format")
def show_format(
    kind: Annotated[str | None, typer.Argument(
        show_default="all", help="roles, questions or traits.")] = None,
) -> None:
    """Explain the file formats of roles, questions and traits, with an example of each."""
    from jaxpersona.data import formats

    say(*formats.describe(kind))


@app.command()
def export(
    folder: Annotated[pathlib.Path, typer.Argument(help="A new or empty folder.")],
) -> None:
    """Write the package data to a folder, so that it can be edited and passed to `axis --roles`."""
    from jaxpersona.data.export import export as write

    say(f"{write(folder)} files in {folder}")
