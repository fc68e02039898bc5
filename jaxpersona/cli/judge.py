"""The commands of `jaxpersona judge`: judge a run, compare judges, and read replies by score."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from jaxpersona.cli.judge_agreement import agreement
from jaxpersona.cli.judge_run import run
from jaxpersona.cli.judge_sample import sample


class _Group(TyperGroup):
    """Takes a first argument that is no command as the folder of the command `run`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command of arguments."""
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(no_args_is_help=True, cls=_Group, help=(
    "Judge the replies of a run (`judge RUN --judge …`), compare judges, and read replies by their "
    "scores."))
for command in (run, agreement, sample):
    app.command()(command)
