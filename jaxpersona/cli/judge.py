"""The commands of `jaxpersona judge`: compare judges, and read replies by score."""

from __future__ import annotations

import typer

from jaxpersona.cli.judge_agreement import agreement
from jaxpersona.cli.judge_sample import sample

app = typer.Typer(no_args_is_help=True, help="Compare judges, and read replies by their scores.")
for command in (agreement, sample):
    app.command()(command)
