"""The commands of `jaxpersona runs`: exchange runs with the published Assistant Axis code."""

from __future__ import annotations

import json
import pathlib
import shlex
from typing import Annotated

import typer

from jaxpersona import interrupt
from jaxpersona.cli import support
from jaxpersona.cli.output import say
from jaxpersona.cli.support import (
    AdapterOption,
    DtypeOption,
    MinCountOption,
    check_folder,
    progress,
)
from jaxpersona.errors import UserError

app = typer.Typer(no_args_is_help=True, help=(
    "Export a run as an output folder of the published Assistant Axis code (github.com/"
    "safety-research/assistant-axis), or import such a folder as a run."))


@app.command()
def export(
    run: Annotated[pathlib.Path, typer.Argument(help="The run folder of `jaxpersona axis --out`.")],
    folder: Annotated[pathlib.Path, typer.Argument(help="A new or empty folder.")],
    reference: Annotated[bool, typer.Option("--reference", help=(
        "Use the format of the published Assistant Axis code. Required; it is the only "
        "format."))] = False,
    activations: Annotated[str, typer.Option(help=(
        "The response means to write: `all` (an error if the run does not store all of them), "
        "`sample` (the stored ones, in a separate folder) or `none`."))] = "all",
    judge: Annotated[str | None, typer.Option(
        show_default="the last judge of the run",
        help="The name of the judge whose scores are exported, as in run.json.")] = None,
    min_count: Annotated[int | None, typer.Option(
        show_default="as in the run",
        help="Minimum number of replies with score 3 that a role needs for a vector.")] = None,
    fold_system: Annotated[bool, typer.Option("--fold-system", help=(
        "Write system prompts as the beginning of the user's messages, for models whose chat "
        "template has no system role, such as Gemma 2."))] = False,
    incomplete: Annotated[bool, typer.Option("--incomplete", help=(
        "Omit roles whose rollouts are not complete."))] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Export a run so that the published scripts can continue it.

    The command writes responses, scores, vectors, the axis (if it can be computed) and, depending
    on `--activations`, the response means.
    """
    from jaxpersona.persona.exporting import export_reference

    if not reference:
        raise UserError("--reference is missing; give it to select the format of the published "
                        "code, the only format")
    check_folder("FOLDER", folder)
    with interrupt.keeping(lambda: "nothing was written"), progress(log=True) as report:
        found = export_reference(run, folder, activations=activations, judge=judge,
                                 min_count=min_count, fold_system=fold_system,
                                 incomplete=incomplete, report=report)
    if as_json:
        print(json.dumps({"folder": str(folder), "rollouts": found.rollouts,
                          "scores": found.scores, "means": found.means,
                          "roles_in_axis": found.roles, "notes": found.notes}))
        return
    axis = f", axis of {len(found.roles)} roles" if found.roles else ""
    say(f"{folder}: {found.rollouts:,} rollouts, {found.scores:,} scores, {found.means:,} response "
        f"means{axis}", *(f"  {note}" for note in found.notes))


@app.command("import")
def import_(
    folder: Annotated[pathlib.Path, typer.Argument(
        metavar="DIR", help="The output folder of the published code, with responses/.")],
    run: Annotated[pathlib.Path, typer.Argument(help="The run folder to write.")],
    model: Annotated[str | None, typer.Option("--model", show_default="unknown", help=(
        "The model that generated the responses, in a form that `jaxpersona axis --model` accepts. "
        "Without it, `jaxpersona axis` cannot continue the run."))] = None,
    roles: Annotated[str | None, typer.Option(
        show_default="the prompts in the responses",
        help="The folder of the roles with which the responses were generated, or `data` for the "
             "roles of the package.")] = None,
    judge: Annotated[str, typer.Option(
        help="The judge name to record for the scores.")] = "imported",
    min_count: MinCountOption = 50,
    held_out: Annotated[str, typer.Option(
        show_default="none",
        help="Comma-separated names of roles to exclude from the axis.")] = "",
    keep_means: Annotated[str, typer.Option(help=(
        "Number of replies per role whose mean activations are stored to compute thresholds, or "
        "`all`."))] = "16",
    max_new_tokens: Annotated[int, typer.Option(
        help="Maximum length in tokens of replies that are generated later.")] = 512,
    temperature: Annotated[float, typer.Option(
        help="Sampling temperature of replies that are generated later.")] = 0.7,
    top_p: Annotated[float, typer.Option(
        help="Cumulative probability for nucleus sampling of replies that are generated "
             "later.")] = 0.9,
    batch_size: Annotated[int, typer.Option(
        help="Batch size for replies that are generated later.")] = 32,
    seed: Annotated[int, typer.Option(
        help="Random seed for choosing the replies whose means are stored, and for replies that "
             "are generated later.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=(
        "Replace the run in the folder RUN; other files in the folder are kept."))] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Import the output folder of the published code as a run; compute its axis if possible."""
    from jaxpersona.data import texts
    from jaxpersona.engine.sampling import sampling
    from jaxpersona.persona.importing import import_reference
    from jaxpersona.runs.rollouts import Settings

    sampling(1, temperature=temperature, top_p=top_p, seed=seed)
    settings = Settings(temperature, top_p, max_new_tokens, 1, batch_size, seed)
    kept, held = support.kept_means(keep_means), [name for name in held_out.split(",") if name]
    check_folder("RUN", run)
    if model is None and (adapter is not None or dtype is not None):
        raise UserError("--adapter and --dtype apply to a model; give the model with --model")
    name = "the model" if model is None else model.rstrip("/").split("/")[-1].split(":")[-1]
    cast = None if roles is None else texts.load_roles(
        None if roles == "data" else pathlib.Path(roles), model_name=name)
    loaded = None if model is None else support.open_model(model, dtype, None, adapter)
    with interrupt.keeping(lambda: "nothing was written"), progress(log=True) as report:
        found = import_reference(folder, run, model=loaded, roles=cast, judge=judge,
                                 settings=settings, min_count=min_count, held_out=held,
                                 keep_means=kept, overwrite=overwrite, report=report)
    if found.extraction is not None:
        support.draw_run(run, found.extraction, found.extraction.axis.n_layers // 2, held)
    counts = {"rollouts": sum(found.rollouts.values()), "scores": sum(found.scores.values()),
              "means": sum(found.means.values())}
    if as_json:
        print(json.dumps({"run": str(run), "roles": len(found.rollouts), **counts,
                          "roles_in_axis": [] if found.extraction is None
                          else found.extraction.analysis.names, "notes": found.notes}))
        return
    axis = "" if found.extraction is None else (
        f", axis of {len(found.extraction.analysis.names)} roles")
    say(f"{run}: {len(found.rollouts)} roles, {counts['rollouts']:,} rollouts, "
        f"{counts['scores']:,} scores, {counts['means']:,} response means{axis}",
        *(f"  {note}" for note in found.notes))
    if found.extraction is not None:
        options = f" --model {'MODEL' if model is None else shlex.quote(model)}"
        say("next:", f"  jaxpersona vectors check {shlex.quote(str(run / 'axis.safetensors'))}"
                     f"{options}", f"  jaxpersona judge sample {shlex.quote(str(run))} --score 3")
