"""The command `jaxpersona demo`: extract an axis of `mini`, calibrate a cap, and evaluate both."""

from __future__ import annotations

import json
import pathlib
import time
from typing import TYPE_CHECKING, Annotated

import typer

from jaxpersona import interrupt
from jaxpersona.cli import support
from jaxpersona.cli.output import cell, console, say
from jaxpersona.cli.support import ModelOption, check_folder, kept_of, progress
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.organism.demo import Demo


def demo(
    out: Annotated[pathlib.Path, typer.Option(help="The run folder.")] = pathlib.Path("runs/demo"),
    model: ModelOption = "mini",
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
) -> None:
    """Extract the Assistant Axis of `mini`, calibrate a cap, and evaluate both.

    The axis and the cap are evaluated against the known ground truth of `mini`. The command writes
    a run folder with figures. It prints measurements and two conversations, each with the replies
    to its last message, without and with the cap. The last line of the output is JSON.
    """
    from jaxpersona.organism.demo import run_demo
    from jaxpersona.organism.method import held_out
    from jaxpersona.report import figures
    from jaxpersona.report.run_drift import save_drift

    started = time.perf_counter()
    if model != "mini":
        raise UserError(f"model is {model!r}; the demo needs the known ground truth of mini, so "
                        "use `jaxpersona axis` for other models")
    check_folder("--out", out)
    with progress(log=True) as report:
        loaded = support.open_model(model, None)
        middle = loaded.config.n_layers // 2
        with interrupt.keeping(lambda: kept_of(out)):
            done = run_demo(loaded, out, seed=seed, report=report)
            leak = {name: done.figures[f"drift_leak_{name}"] for name in done.talks}
            save_drift(out, done.talks, done.extraction.axis, middle, behaviour=done.styles,
                       leak=leak)
            if support.draw_run(out, done.extraction, middle, held_out()):
                figures.drift(out / "drift.png", done.talks, done.extraction.axis, middle,
                              behaviour=done.styles, leak=leak)
    _show(done)
    say(f"wrote the run, with its axis and vectors, to {out}", error=True)
    head = {"run": str(out), "model": loaded.name,
            "seconds": round(time.perf_counter() - started, 1)}
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in done.figures.items()}
    print(json.dumps(head | rounded), flush=True)


def _show(done: Demo) -> None:
    """Print the measurements (a table and lines of text) and the sample conversations."""
    from rich.table import Table

    from jaxpersona.organism.demo import geometry, table

    shown = Table("embedded model", "uncapped", "capped: upper half of the layers, floor p25")
    for row in table(done.figures):
        shown.add_row(*map(cell, row))
    console().print(shown)
    say(*geometry(done.figures))
    for sample in done.samples:
        say("", f"{sample.title}:")
        say(*(f"  {message['role']}: {message['content']}" for message in sample.messages))
        say(f"  uncapped: {sample.uncapped}", f"  capped:   {sample.capped}")
    say("")
