"""The commands of `jaxpersona data`: check, show and export the prompt data, and
explain its file formats.
"""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from jaxpersona.cli.output import say

app = typer.Typer(no_args_is_help=True, help="Check, show and export prompt data (roles, "
                                             "questions, traits, drift), and explain its file "
                                             "formats.")


@app.command()
def check(
    folder: Annotated[
        pathlib.Path | None, typer.Argument(
            show_default="the package data",
            help="A folder that contains roles/, questions.jsonl, traits/ or drift/.")
    ] = None,
) -> None:
    """Check all prompt data in a folder, and print either a summary or all errors."""
    from jaxpersona.data.export import check_data

    say(*check_data(folder))


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="The kind of entry: role, question, trait or drift.")],
    name: Annotated[str | None, typer.Argument(
        show_default="list all", help="The name of a role, trait or drift domain, or the id of "
                                     "a question.")] = None,
) -> None:
    """Print one entry of the package data, or list all entries of a kind."""
    from jaxpersona.data import export

    say(export.show(kind, name))


@app.command("format")
def show_format(
    kind: Annotated[str | None, typer.Argument(
        show_default="all", help="The format to explain: roles, questions or traits.")] = None,
) -> None:
    """Explain the file formats of roles, questions and traits, with an example of each."""
    from jaxpersona.data import formats

    say(*formats.describe(kind))


@app.command()
def export(
    folder: Annotated[pathlib.Path, typer.Argument(help="A new or empty folder.")],
) -> None:
    """Copy the package data to a folder, to edit it and pass it to `jaxpersona axis --roles`."""
    from jaxpersona.data.export import export as write

    say(f"wrote {write(folder)} files to {folder}")
