"""The command `jaxpersona status`: the progress of a run."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from jaxpersona.cli.output import say


def status(
    run: Annotated[pathlib.Path, typer.Argument(help="The folder of `jaxpersona axis --out`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Print the progress, the rate and the time left of a run, also while it is running."""
    from jaxpersona.runs.status import describe, read_status

    found = read_status(run)
    if as_json:
        print(json.dumps(found))
        return
    say(*describe(found))
