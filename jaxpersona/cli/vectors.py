"""The commands of `jaxpersona vectors`: show and convert files of directions."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Annotated

import typer

from jaxpersona.cli.output import cell, console, heading, say
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.vectors.caps import Caps, Found
    from jaxpersona.vectors.vector import Vector

app = typer.Typer(no_args_is_help=True, help="Show and convert directions in files.")

KindOption = Annotated[str | None, typer.Option(
    help="What a bare tensor in a .pt file is: axis, role or persona.")]


@app.command()
def show(file: pathlib.Path, kind: KindOption = None) -> None:
    """Show the metadata of a file of directions (.safetensors, .pt, .gguf, .npy)."""
    from jaxpersona.ckpts.vectors import load_any

    found = load_any(file, kind)
    if isinstance(found, dict):
        _show_caps(found)
    else:
        _show_vector(found)


@app.command()
def convert(
    source: Annotated[pathlib.Path, typer.Argument(help="A .safetensors, .pt, .gguf or .npy.")],
    target: Annotated[pathlib.Path, typer.Argument(help="A .safetensors, .gguf or .npy.")],
    model: Annotated[str | None, typer.Option(
        help="The model it belongs to: checked, and written to the file with the fingerprint of "
             "its weights. For random:<preset> only the shape is checked.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(
        help="Which experiment of a capping_config.pt.")] = None,
    kind: KindOption = None,
    name: Annotated[str | None, typer.Option(help="The direction's new name.")] = None,
) -> None:
    """Convert a file of directions to the format of the target's suffix."""
    from jaxpersona.ckpts.vectors import load_any, save_vector

    found = load_any(source, kind)
    if isinstance(found, dict):
        listed = ", ".join(found)
        if experiment is None and len(found) > 1:
            raise UserError(f"{source}: holds {len(found)} experiments; choose one with "
                            f"--experiment: {listed}")
        if experiment not in (None, *found):
            raise UserError(f"experiment is {experiment!r}; {source} holds {listed}")
        chosen = found[experiment] if experiment else next(iter(found.values()))
    elif experiment is not None:
        raise UserError(f"--experiment is for files of caps; {source} holds a {found.kind}")
    else:
        chosen = found
    if name is not None:
        chosen = dataclasses.replace(chosen, name=name)
    if model is not None:
        chosen = _belonging(chosen, model)
    lost = save_vector(target, chosen)
    bare = target.suffix.lower() == ".npy"
    shape = " × ".join(map(str, chosen.values.shape))
    say(f"{target}: {f'the values alone, {shape}' if bare else _described(chosen)}")
    for key, value in () if bare else chosen.notes.items():
        say(f"  {key}: {value}")
    if lost:
        say(f"  not written, because {target.suffix} cannot hold it: {', '.join(lost)}")
    if bare:
        return
    if model is not None and model.startswith("random:"):
        say(f"  {model}: only the shape was checked; random weights depend on the dtype, so no "
            "fingerprint was written")
    elif not chosen.fingerprint:
        say("  the file does not name its model; --model NAME adds it")


def _belonging(chosen: Found, source: str) -> Found:
    """Check a direction or caps against a model, and add the model's name and fingerprint."""
    from jaxpersona.cli.support import open_model
    from jaxpersona.models.params import SCHEME
    from jaxpersona.models.presets import preset
    from jaxpersona.vectors.caps import fitted

    if source.startswith("random:"):
        chosen = fitted(chosen, preset(source.removeprefix("random:")), source)
        return chosen if chosen.fingerprint else dataclasses.replace(chosen, model=source)
    say(f"{source}: reading the weights for their fingerprint", error=True)
    model = open_model(source, None)
    chosen = fitted(chosen, model.config, model.name, model.fingerprint)
    return dataclasses.replace(chosen, model=model.name, fingerprint=model.fingerprint,
                               fingerprint_scheme=SCHEME)


def _described(found: Vector | Caps) -> str:
    from jaxpersona.vectors.caps import Caps

    if isinstance(found, Caps):
        return (f"{len(found.layers)} caps {found.name!r} at layers "
                f"{', '.join(map(str, sorted(set(found.layers))))}, width {found.values.shape[1]}")
    return f"{found.kind} {found.name!r}, {found.n_layers} layers, width {found.values.shape[1]}"


def _show_facts(found: Vector | Caps, shape: str) -> None:
    from rich.table import Table

    table = Table("field", "value", show_header=False)
    facts = {"kind": found.kind, "name": found.name, "model": found.model or "unknown",
             "fingerprint": (f"{found.fingerprint} (scheme {found.fingerprint_scheme})"
                             if found.fingerprint else "unknown"),
             "site": getattr(found, "site", "residual"), "layers": "zero-based, after the block",
             "shape": shape, **found.notes}
    for key, value in facts.items():
        table.add_row(cell(key), cell(value))
    console().print(table)


def _show_vector(vector: Vector) -> None:
    from rich.table import Table

    from jaxpersona.interventions.bank import normalised

    _show_facts(vector, f"[{vector.values.shape[0]} layers, width {vector.values.shape[1]}]")
    tables = getattr(vector, "percentiles", {})
    norms = Table("layer", "norm", *[heading(f"{of} p25") for of in tables])
    known = [table.get("p25") for table in tables.values()]
    for i, norm in enumerate(normalised(vector.values)[1]):
        norms.add_row(str(i), f"{norm:.4g}", *["" if p is None else f"{p[i]:.4g}" for p in known])
    console().print(norms)


def _show_caps(experiments: dict[str, Caps]) -> None:
    """Print the first experiment in full and the others as one line each."""
    from rich.table import Table

    first = next(iter(experiments.values()))
    _show_facts(first, f"[{len(first.layers)} caps, width {first.values.shape[1]}]")
    floors = Table("order", "layer", "vector", "floor")
    for i, (layer, label, floor) in enumerate(
            zip(first.layers, first.labels, first.floors, strict=True)):
        floors.add_row(str(i), str(layer), cell(label), f"{floor:.4g}")
    console().print(floors)
    for other in list(experiments.values())[1:]:
        console().print(cell(f"also {_described(other)}"))
