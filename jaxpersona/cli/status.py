"""The command `jaxpersona status`: print the progress of a run."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from jaxpersona.cli.output import say


def status(
    run: Annotated[pathlib.Path, typer.Argument(help="The run folder of `jaxpersona axis --out`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Print the progress, rate and remaining time of a run, even while the run is active."""
    from jaxpersona.runs.status import describe, read_status

    found = read_status(run)
    if as_json:
        print(json.dumps(found))
        return
    say(*describe(found))
