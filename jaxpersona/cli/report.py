"""The command `jaxpersona report`: write a page about a run, as one HTML file."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from jaxpersona import interrupt
from jaxpersona.cli.output import say
from jaxpersona.cli.support import check_output, progress


def report(
    run: Annotated[pathlib.Path, typer.Argument(help="The folder of `jaxpersona axis --out`.")],
    out: Annotated[pathlib.Path | None, typer.Option(
        show_default="report.html in the run folder",
        help="The HTML file to write; an existing file is replaced.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Write a page about a run: one HTML file with figures and dialogues that works offline.

    The run may be unfinished; the page then lists the missing parts.
    """
    from jaxpersona.report import write_page
    from jaxpersona.report.run_read import check_run
    from jaxpersona.runs.files import PAGE

    file = check_run(run) / PAGE if out is None else out
    check_run(run)
    check_output("--out", file)
    with interrupt.keeping(lambda: "no page was written"), progress(log=True) as tell:
        path = write_page(run, file, report=tell)
    size = path.stat().st_size
    if as_json:
        print(json.dumps({"run": str(run), "page": str(path), "bytes": size}))
        return
    say(f"wrote {path} ({size / 1e6:.1f} MB, one file that needs no network); open it in a browser")
