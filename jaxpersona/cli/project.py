"""The command `jaxpersona project`: project each assistant message on directions."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from jaxpersona.cli import support
from jaxpersona.cli.output import console, heading, say
from jaxpersona.cli.support import AdapterOption, DtypeOption, ModelOption
from jaxpersona.errors import UserError


def project(
    conversation: Annotated[pathlib.Path, typer.Argument(help="A JSON list of messages.")],
    vector: Annotated[list[pathlib.Path], typer.Option("--on", help="Axis or vector files.")],
    model: ModelOption = "mini",
    layer: Annotated[int | None, typer.Option(help="Default: the middle.")] = None,
    png: Annotated[pathlib.Path | None, typer.Option(help="Draw them to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Project each assistant message of a conversation on directions."""
    import numpy as np
    from rich.table import Table

    from jaxpersona.ckpts.vectors import load_vector
    from jaxpersona.inputs import read_json
    from jaxpersona.persona.check import fit
    from jaxpersona.persona.talk import project_conversation
    from jaxpersona.report import figures
    from jaxpersona.text import chat

    if png is not None and png.is_dir():
        raise UserError(f"--png is {png}, a folder; give the name of the picture's file")
    if png is not None and not png.parent.is_dir():
        raise UserError(f"--png is {png}; there is no folder {png.parent}: create it first")
    talk = read_json(conversation)
    if isinstance(talk, dict):
        talk = talk.get("conversation", talk.get("messages"))
    if not isinstance(talk, list):
        raise UserError(f"{conversation}: must hold a list of messages with role and content")
    vectors = [load_vector(file) for file in vector]
    loaded = support.open_model(model, dtype, None, adapter)
    vectors = [fit(loaded, vector) for vector in vectors]
    total = loaded.config.n_layers
    at = total // 2 if layer is None else layer
    if not 0 <= at < total:
        raise UserError(f"layer is {layer}; the model has layers 0…{total - 1}")
    empty = [vector.name for vector in vectors if not vector.values[at].any()]
    if empty:
        raise UserError(f"{empty[0]!r} is zero at layer {at}; choose another with --layer")
    try:
        chat.check_conversation(talk, reply=False)
        found = project_conversation(loaded, talk, vectors)
    except UserError as error:
        raise UserError(f"{conversation}: {error}") from None
    names = [vector.name for vector in vectors]
    if len(set(names)) < len(names):  # e.g. two axes, both named "assistant"
        names = [f"{vector.name} ({file})" for vector, file in zip(vectors, vector, strict=True)]
    if as_json:
        print(json.dumps([{"turn": t.turn, "tokens": t.tokens, "layer": at,
                           **dict(zip(names, t.values[at].tolist(), strict=True))}
                          for t in found]))
    else:
        table = Table("message", "tokens", *[heading(f"{name} (layer {at})") for name in names])
        for t in found:
            table.add_row(str(t.turn), str(t.tokens), *[f"{v:.3f}" for v in t.values[at]])
        console().print(table)
    if png is not None:
        figures.conversation(png, [t.turn for t in found],
                             np.stack([t.values[at] for t in found]), names, at)
        say(f"wrote {png}", error=True)
