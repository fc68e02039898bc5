"""The commands of `jaxpersona judge`: judge a run, compare judges, and sample replies by score."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from jaxpersona.cli.judge_agreement import agreement
from jaxpersona.cli.judge_run import run
from jaxpersona.cli.judge_sample import sample


class _Group(TyperGroup):
    """A command group that accepts `judge RUN` as a short form of `judge run RUN`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolve a command, with "run" inserted if the first argument is not a command."""
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(no_args_is_help=True, cls=_Group, help=(
    "Judge the replies of a run (`judge RUN --judge …`), compare two judges, or sample replies by "
    "score."))
for command in (run, agreement, sample):
    app.command()(command)
