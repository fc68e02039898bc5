"""Options and functions that several commands use, for example to load a model."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxpersona import interrupt
from jaxpersona.brief import shown
from jaxpersona.cli.output import console, say, write
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from jaxpersona.models.model import Model
    from jaxpersona.persona.extraction import Extraction

Report = Callable[[str, int, int, int], None]  # step, done, total, tokens (see `progress`)
_SHOWING: list[Report] = []  # the report function of the running display, if there is one
LOG_SECONDS = 30.0  # time in seconds between progress lines if standard error is not a terminal
ModelOption = Annotated[str, typer.Option("--model", help=(
    "A checkpoint folder, a .gguf file, `mini`, `random:<preset>` or the name of a model on the "
    "Hugging Face Hub."))]
AdapterOption = Annotated[pathlib.Path | None, typer.Option("--adapter", show_default="none", help=(
    "The folder of a LoRA adapter for the model; it is merged into the weights."))]
DtypeOption = Annotated[str | None, typer.Option(
    show_default="float32 on a CPU, otherwise bfloat16",
    help="The dtype: float32, bfloat16, float16, or int8 for the weights only.")]
LengthOption = Annotated[int, typer.Option(
    "--max-new-tokens", help="Maximum length of a reply in tokens.")]
TemperatureOption = Annotated[float, typer.Option(
    "--temperature", help="Sampling temperature; 0 selects greedy decoding.")]
TopPOption = Annotated[float, typer.Option(
    "--top-p", help="Cumulative probability for nucleus sampling.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Random seed for sampling.")]
MinCountOption = Annotated[int, typer.Option("--min-count", help=(
    "Minimum number of replies with score 3 that a role needs to be used for the axis."))]


def kept_means(text: str) -> int | None:
    """Return the value of `--keep-means` as an integer, or None for `all`.

    Raises:
      UserError: the value is neither `all` nor an integer of at least 2 with at most nine digits.
    """
    from jaxpersona.runs.sample import check_keep

    if text == "all":
        return None
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"--keep-means is {shown(text)}; give a number of replies, or all")
    check_keep(int(text))
    return int(text)


def typed(context: typer.Context) -> set[str]:
    """Return the names of the running command's arguments and options that the user gave."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items()
            if source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")}


def open_model(source: str, dtype: str | None, mesh: str | None = None,
               adapter: pathlib.Path | None = None) -> Model:
    """Load a model, optionally on a mesh and with a LoRA adapter, and show the progress.

    Args:
      source: the value of `--model`.
      dtype, mesh, adapter: the values of `--dtype`, `--mesh` and `--adapter`, or None.

    Raises:
      UserError: the model or the adapter cannot be loaded, or the dtype or the mesh is invalid.
    """
    from jaxpersona.ckpts.loading import load
    from jaxpersona.distributed import sharding

    sizes = None if mesh is None else sharding.parse_mesh(mesh)
    spread = None if sizes is None else sharding.make_mesh(
        sizes.get("data", 1), sizes.get("model", 1), fsdp=sizes.get("fsdp", 1))
    with progress(log=True) as report:
        return load(source, dtype=dtype, mesh=spread, adapter=adapter,
                    progress=lambda done, total: report("load", done, total, 0))


@contextlib.contextmanager
def progress(log: bool = False, note: Callable[[], str] | None = None) -> Iterator[Report]:
    """Yield a function report(step, done, total, tokens) that shows the progress of steps.

    The arguments of the function are the name of a step, the number of units (such as replies, or
    bytes in the step "load") that are done, the total number of units, and the number of tokens
    processed so far in the step, or 0.

    If standard error is a terminal, the progress is shown as bars; otherwise, if `log` is True, a
    line is printed every `LOG_SECONDS`, even before the first step and after the last one. Both
    show the remaining time, the rate if `tokens` is not 0, and in the step "judging" the result of
    `note()`, such as the cost so far. Within the block, inner blocks add their steps to the same
    display. Only the first process shows the progress, but in every process, each call of the
    function checks for an interrupt (`interrupt.check`).
    """
    from jaxpersona.distributed import processes

    shown = console(error=True)
    if _SHOWING:
        yield _SHOWING[-1]
    elif not processes.first() or not (shown.is_interactive or log):
        yield _silent
    else:
        with (_bars(shown, note) if shown.is_interactive else _logged(note)) as report:
            _SHOWING.append(report)
            try:
                yield report
            finally:
                _SHOWING.pop()


@contextlib.contextmanager
def _bars(shown: Console, note: Callable[[], str] | None) -> Iterator[Report]:
    """Yield a report function that shows a bar for each step."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
                   console=shown)
    tasks: dict[str, Any] = {}
    begun: dict[str, float] = {}
    latest: dict[str, int] = {}
    with bar:
        def report(step: str, done: int, total: int, tokens: int) -> None:
            interrupt.check()
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total, rate="")
            if done < latest.get(step, math.inf):  # the step begins, or begins again
                begun[step] = time.perf_counter()
            latest[step] = done
            spent = max(time.perf_counter() - begun[step], 1e-9)
            rate = f"{tokens / spent:,.0f} tok/s" if tokens else ""
            if step == "load":
                rate = f"{done / spent / 1e9:.2f} GB/s"
            if step == "judging" and note is not None:
                rate = note()
            bar.update(tasks[step], completed=done, total=total, rate=rate)

        yield report


def _silent(step: str, done: int, total: int, tokens: int) -> None:
    """Check for an interrupt, without showing any progress."""
    interrupt.check()


def stream(pieces: Iterable[str]) -> None:
    """Print the pieces of a streamed reply and a final newline.

    A spinner is shown until the first nonempty piece, which may take several seconds, because the
    model's programs are compiled first. It is shown only if standard error is a terminal.
    """
    shown = console(error=True)
    status = shown.status("waiting for the first token") if shown.is_interactive else None
    if status is not None:
        status.start()
    try:
        for piece in pieces:
            if piece and status is not None:
                status.stop()
                status = None
            write(piece)
    finally:
        if status is not None:
            status.stop()
    write("\n")


@contextlib.contextmanager
def _logged(note: Callable[[], str] | None) -> Iterator[Report]:
    """Yield a report function, and print the progress of the current step every `LOG_SECONDS`.

    Before the first step, the line gives the time since the start of the block. After the last
    report of a complete step, it gives the time since that report. A thread prints the lines to
    standard error.
    """
    begun: dict[str, tuple[float, int]] = {}  # step → (time, `done`) at its first report
    latest: dict[str, int] = {}
    state: list[tuple[str, int, int, int, float]] = []
    ended, opened = threading.Event(), time.perf_counter()

    def report(step: str, done: int, total: int, tokens: int) -> None:
        interrupt.check()
        if done < latest.get(step, math.inf):  # the step begins, or begins again
            begun[step] = (time.perf_counter(), done)
        latest[step] = done
        state[:] = [(step, done, total, tokens, time.perf_counter())]

    def line() -> str:
        now = time.perf_counter()
        if not state:
            return f"preparing: {_duration(now - opened)}"
        step, done, total, tokens, last = state[0]
        shown = f"{step} {done:,}/{total:,}"
        if step == "load":
            shown = f"load {done / 1e9:.1f}/{total / 1e9:.1f} GB"
        if done >= total:
            return f"{shown} complete; the next step has taken {_duration(now - last)} so far"
        start, first = begun[step]  # `first` is positive if the run was resumed
        spent, made = now - start, done - first
        return (shown + (f", {tokens / spent:,.0f} tokens/s" if tokens else "")
                + (f", {said}" if step == "judging" and note and (said := note()) else "")
                + (f", about {_duration(spent / made * (total - done))} left" if made else ""))

    def write() -> None:
        while not ended.wait(LOG_SECONDS):
            say(line(), error=True)
            sys.stderr.flush()

    thread = threading.Thread(target=write, daemon=True, name="progress")
    thread.start()
    try:
        yield report
    finally:
        ended.set()
        thread.join()


def _duration(seconds: float) -> str:
    """Return a duration as text in seconds, minutes or hours, such as "3 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def check_folder(option: str, folder: pathlib.Path) -> None:
    """Check that the path of an output folder is not an existing file.

    Raises:
      UserError: the path is a file.
    """
    if folder.is_file():
        raise UserError(f"{option} is {folder}, a file; give a folder")


def check_output(option: str, file: pathlib.Path) -> None:
    """Check that an output file is an existing regular file or can be created.

    Commands call this function before a long computation. They replace an existing file.

    Raises:
      UserError: the path exists but is not a regular file, or it does not exist and cannot be
        created.
    """
    from jaxpersona.ckpts.files import atomic

    if file.is_dir():
        raise UserError(f"{option} is {file}, a folder; give the name of a file")
    if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
        raise UserError(f"{option} is {file}, not a regular file; give another name")
    if not file.exists():  # create and delete the file and its folders, as a test
        missing = [folder for folder in file.absolute().parents if not folder.exists()]
        with atomic(file) as temporary:
            temporary.touch()
        file.unlink()
        for folder in missing:
            folder.rmdir()


def kept_of(folder: pathlib.Path) -> str:
    """Describe the saved contents of a run folder, for the message of an interrupted command."""
    from jaxpersona.runs.status import kept

    if not (folder / "run.json").exists():
        return "nothing was written"
    rollouts, verdicts, roles = kept(folder)
    held = f"{rollouts:,} rollouts" if rollouts else "its settings"
    if verdicts:
        held += f" and {verdicts:,} verdicts"
    if roles:
        held += f" (complete roles: {roles:,})"
    axis = " and the axis" if (folder / "axis.safetensors").exists() else ""
    return f"{folder} contains {held}{axis}; run the same command to resume"


def draw_run(folder: pathlib.Path, extraction: Extraction, middle: int,
             held_out: Sequence[str]) -> bool:
    """Write the figures of an extraction to the run folder; return whether all were drawn.

    If a figure cannot be drawn, the reason is printed and the remaining figures are omitted.

    Args:
      folder: the run folder.
      extraction: the axis, the role vectors and their analysis.
      middle: the zero-based index of the layer that the figures show.
      held_out: the names of the roles excluded from the axis.
    """
    from jaxpersona.extras import require
    from jaxpersona.report import figures

    try:
        require("matplotlib", "figures need matplotlib")
        figures.roles_on_axis(folder / "roles.png", extraction, middle, held_out)
        figures.components(folder / "pca.png", extraction.analysis, middle, extraction.default)
        figures.variance(folder / "variance.png", extraction.analysis, middle)
    except UserError as error:  # e.g. matplotlib is missing; the run is complete without figures
        say(f"not all figures could be drawn: {error}", error=True)
        return False
    return True
