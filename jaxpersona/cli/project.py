"""The command `jaxpersona project`: project each assistant message onto directions."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from jaxpersona.cli import support
from jaxpersona.cli.output import cell, console, heading, say
from jaxpersona.cli.support import AdapterOption, DtypeOption, ModelOption
from jaxpersona.errors import UserError
from jaxpersona.extras import require

if TYPE_CHECKING:
    from jaxpersona.persona.reference import Reference


def project(
    conversation: Annotated[pathlib.Path, typer.Argument(
        help="A JSON file with a list of messages, or a file that /save wrote in `chat`.")],
    vector: Annotated[list[pathlib.Path], typer.Option(
        "--on", help="A file with an axis or vector. The option may be repeated.")],
    model: ModelOption = "mini",
    layer: Annotated[int | None, typer.Option(
        show_default="the middle layer", help="The zero-based index of the layer.")] = None,
    png: Annotated[pathlib.Path | None, typer.Option(
        show_default="none",
        help="Write a figure of the projections to this file, and as SVG beside it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Project each assistant message of a conversation onto directions.

    If an axis has thresholds, the command compares each projection with the projections of the
    default persona's replies. It prints the distance from their median in standard deviations (z),
    the nearest percentiles below and above the projection and, if the axis is in its run folder,
    the nearest roles.
    """
    import numpy as np
    from rich.table import Table

    from jaxpersona.ckpts.vectors import load_vector
    from jaxpersona.inputs import read_json
    from jaxpersona.persona.check import fit
    from jaxpersona.persona.reference import reference
    from jaxpersona.persona.talk import project_conversation
    from jaxpersona.report.messages import messages
    from jaxpersona.text import chat

    if png is not None and png.is_dir():
        raise UserError(f"--png is {png}, a folder; give the name of a file")
    if png is not None and not png.parent.is_dir():
        raise UserError(f"--png is {png}; the folder {png.parent} does not exist: create it first")
    if png is not None:
        require("matplotlib", "--png needs matplotlib")
    talk = read_json(conversation)
    if isinstance(talk, dict):
        talk = talk.get("conversation", talk.get("messages"))
    if not isinstance(talk, list):
        raise UserError(f"{conversation}: must contain a list of messages with role and content")
    vectors = [load_vector(file) for file in vector]
    loaded = support.open_model(model, dtype, None, adapter)
    vectors = [fit(loaded, vector) for vector in vectors]
    total = loaded.config.n_layers
    at = total // 2 if layer is None else layer
    if not 0 <= at < total:
        raise UserError(f"layer is {layer}; the model has layers 0…{total - 1}")
    empty = [vector.name for vector in vectors if not vector.values[at].any()]
    if empty:
        raise UserError(f"{empty[0]!r} is zero at layer {at}; choose another layer with --layer")
    references = [reference(one, at, file) for one, file in zip(vectors, vector, strict=True)]
    try:
        chat.check_conversation(talk, reply=False)
        found = project_conversation(loaded, talk, vectors)
    except UserError as error:
        raise UserError(f"{conversation}: {error}") from None
    names = [vector.name for vector in vectors]
    if len(set(names)) < len(names):  # e.g. two axes with the name "assistant"
        names = [f"{vector.name} ({file})" for vector, file in zip(vectors, vector, strict=True)]
    if as_json:
        print(json.dumps([
            {"turn": t.turn, "tokens": t.tokens, "layer": at,
             **dict(zip(names, t.values[at].tolist(), strict=True)),
             "compared": {name: _compared(known, float(value)) for name, known, value in
                          zip(names, references, t.values[at], strict=True) if known}}
            for t in found]))
    else:
        table = Table("message", "tokens")
        for name, known in zip(names, references, strict=True):
            table.add_column(heading(f"{name} (layer {at})"))
            for column in ("z", "default's", *(["nearest roles"] if known.roles else [])) \
                    if known else ():
                table.add_column(column)
        for t in found:
            table.add_row(str(t.turn), str(t.tokens), *[
                cell(text) for known, value in zip(references, t.values[at], strict=True)
                for text in _cells(known, float(value))])
        console().print(table)
        for name, known in zip(names, references, strict=True):
            if known is not None:
                low, high = (known.percentiles[p] for p in (25.0, 75.0))
                say(f"percentiles of the default persona's projections onto {name}: p25 {low:.3f}, "
                    f"p75 {high:.3f}, p1 {known.percentiles[1.0]:.3f}, p99 "
                    f"{known.percentiles[99.0]:.3f}; the default floor of --cap is p25, "
                    f"{known.floor:.3f}")
    if png is not None:
        messages(png, [t.turn for t in found], np.stack([t.values[at] for t in found]), names, at,
                 references)
        say(f"wrote {png}", error=True)


def _compared(known: Reference, value: float) -> dict[str, object]:
    """Return a JSON object that compares `value` with the projections in a reference."""
    return {"z": round(known.z(value), 4), "default": known.place(value),
            "below_floor": value < known.floor, "nearest": known.nearest(value)}


def _cells(known: Reference | None, value: float) -> list[str]:
    """Return the table cells of a projection: its value and, with a reference, the comparison."""
    if known is None:
        return [f"{value:.3f}"]
    return [f"{value:.3f}", f"{known.z(value):+.1f}", known.place(value),
            *([", ".join(known.nearest(value))] if known.roles else [])]
