"""The commands of `jaxpersona vectors`: show, check and convert files of directions and caps."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxpersona.cli.output import cell, console, heading, say
from jaxpersona.cli.support import AdapterOption, DtypeOption, ModelOption
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.persona.check import Check
    from jaxpersona.vectors.caps import Caps, Found
    from jaxpersona.vectors.vector import Vector

app = typer.Typer(no_args_is_help=True, help=(
    "Show, check and convert files of directions and caps."))

KindOption = Annotated[str | None, typer.Option(
    show_default="from the file's name",
    help="The kind of a bare tensor in a .pt file: axis, role or persona.")]


@app.command()
def show(
    file: Annotated[pathlib.Path, typer.Argument(
        help="A .safetensors, .pt, .gguf or .npy file, or `mini`.")],
    kind: KindOption = None,
) -> None:
    """Show a file's metadata, and the norms and thresholds of a direction or the floors of caps."""
    from jaxpersona.ckpts.vectors import load_any

    found = load_any(file, kind)
    if isinstance(found, dict):
        _show_caps(found)
    else:
        _show_vector(found)


@app.command()
def check(
    file: Annotated[pathlib.Path, typer.Argument(help="A file with an axis or caps, or `mini`.")],
    model: ModelOption = "mini",
    cap_layers: Annotated[str | None, typer.Option(
        show_default="the upper half",
        help="The layers to test, a half-open range such as 46:54.")] = None,
    percentile: Annotated[str | None, typer.Option(
        show_default="p25", help="The percentile of projections to test as the floor.")] = None,
    of: Annotated[str | None, typer.Option(
        show_default="default",
        help="The population from which --percentile is computed, such as `all`.")] = None,
    experiment: Annotated[str | None, typer.Option(
        show_default="the only experiment",
        help="The id of an experiment in a capping_config.pt file.")] = None,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the self-test of `generate --cap` for an axis or caps, with short replies of a model.

    The table lists the mean projections at each tested layer. The z columns give distances from the
    default persona's mean, in standard deviations of the default persona's projections at that
    layer. The command prints the result of each test or, if the sign is wrong, only the result of
    the sign test. If a test fails, the command ends with an error.
    """
    from jaxpersona.cli.caps import open_caps
    from jaxpersona.cli.support import open_model, progress
    from jaxpersona.interventions.bank import parse_layers
    from jaxpersona.persona.check import check as run
    from jaxpersona.vectors.caps import Caps

    if cap_layers is not None:
        parse_layers(cap_layers)
    held = open_caps(file, {"--cap-layers": cap_layers, "--percentile": percentile, "--of": of,
                            "--experiment": experiment})
    options: dict[str, Any] = {}
    if not isinstance(held, Caps):
        options["layers"] = cap_layers
        if percentile is not None or of is not None:
            options["floor"] = held.thresholds(percentile or "p25", of=of or "default")
    loaded = open_model(model, dtype, None, adapter)
    with progress() as report:
        found = run(loaded, held, **options,
                    progress=lambda done, count, tokens: report("check", done, count, tokens))
    if as_json:
        print(json.dumps(_of_check(found)))
    else:
        _show_check(found)
    if not found.ok:
        raise UserError(f"{file}: {'; '.join(found.faults)}")


def _of_check(found: Check) -> dict[str, object]:
    """Return a `Check` as a JSON object."""
    rows = {"default": found.default, "roles": found.roles, "spread": found.spread,
            "z_roles": found.z_roles, "floors": found.floors, "z_floors": found.z_floors}
    return {"ok": found.ok, "sentences": list(found.sentences), "layers": list(found.layers),
            "shift": found.shift,
            **{name: None if row is None else [round(float(x), 4) for x in row]
               for name, row in rows.items()}}


def _show_check(found: Check) -> None:
    """Print a `Check`: a table of projections by layer, and one line per test in `sentences`."""
    from rich.table import Table

    table = Table("layer", "default", "± spread", "roles", "roles, z", "floor", "floor, z")
    floors, z_floors = found.floors, found.z_floors
    for i, layer in enumerate(found.layers):
        floor = ["", ""] if floors is None or z_floors is None else [
            f"{floors[i]:.4g}", f"{z_floors[i]:+.1f}"]
        table.add_row(str(layer), f"{found.default[i]:.4g}", f"{found.spread[i]:.3g}",
                      f"{found.roles[i]:.4g}", f"{found.z_roles[i]:+.1f}", *floor)
    console().print(table)
    say("z: distance from the default persona's mean projection, in standard deviations (spread)",
        *found.sentences)


@app.command()
def convert(
    source: Annotated[pathlib.Path, typer.Argument(
        help="A .safetensors, .pt, .gguf or .npy file.")],
    target: Annotated[pathlib.Path, typer.Argument(help="A .safetensors, .gguf or .npy file.")],
    model: Annotated[str | None, typer.Option(
        show_default="not checked",
        help="The model that the direction or caps must fit; its name and the fingerprint of its "
             "weights are written to the file. For random:<preset>, only the shape is checked.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(
        show_default="the only experiment",
        help="The id of an experiment in a capping_config.pt file.")] = None,
    kind: KindOption = None,
    name: Annotated[str | None, typer.Option(
        show_default="as in the source", help="A new name for the direction or caps.")] = None,
) -> None:
    """Convert a file of directions or caps to the format of the target's suffix.

    The command prints a description of the written file, and lists the data that the format cannot
    store.
    """
    from jaxpersona.ckpts.vectors import load_any, save_vector

    found = load_any(source, kind)
    if isinstance(found, dict):
        listed = ", ".join(found)
        if experiment is None and len(found) > 1:
            raise UserError(f"{source}: contains {len(found)} experiments; choose one with "
                            f"--experiment: {listed}")
        if experiment not in (None, *found):
            raise UserError(f"--experiment is {experiment!r}; the experiments in {source} are "
                            f"{listed}")
        chosen = found[experiment] if experiment else next(iter(found.values()))
    elif experiment is not None:
        raise UserError(f"--experiment applies only to files of caps; {source} contains "
                        f"a direction (kind: {found.kind})")
    else:
        chosen = found
    if name is not None:
        chosen = dataclasses.replace(chosen, name=name)
    if model is not None:
        chosen = _belonging(chosen, model)
    lost = save_vector(target, chosen)
    bare = target.suffix.lower() == ".npy"
    shape = " × ".join(map(str, chosen.values.shape))
    say(f"{target}: {f'values only, {shape}' if bare else _described(chosen)}")
    for key, value in () if bare else chosen.notes.items():
        say(f"  {key}: {value}")
    if lost:
        say(f"  omitted, because {target.suffix} files cannot store this data: {', '.join(lost)}")
    if bare:
        return
    if model is not None and model.startswith("random:"):
        say(f"  {model}: only the shape was checked; random weights depend on the dtype, so no "
            "fingerprint was written")
    elif not chosen.fingerprint:
        say("  the file does not contain the fingerprint of a model; add it with --model NAME")


def _belonging(chosen: Found, source: str) -> Found:
    """Check that a direction or caps fit a model; return them with its name and fingerprint.

    For `random:<preset>`, only the shape is checked. No fingerprint is added, and the model's name
    is added only if `chosen` has no fingerprint.

    Args:
      chosen: the direction or caps.
      source: the value of `--model`.

    Raises:
      UserError: the direction or caps do not fit the model, or the model cannot be loaded.
    """
    from jaxpersona.cli.support import open_model
    from jaxpersona.models.params import SCHEME
    from jaxpersona.models.presets import preset
    from jaxpersona.vectors.caps import fitted

    if source.startswith("random:"):
        chosen = fitted(chosen, preset(source.removeprefix("random:")), source)
        return chosen if chosen.fingerprint else dataclasses.replace(chosen, model=source)
    say(f"{source}: reading the weights to compute their fingerprint", error=True)
    model = open_model(source, None)
    chosen = fitted(chosen, model.config, model.name, model.fingerprint)
    return dataclasses.replace(chosen, model=model.name, fingerprint=model.fingerprint,
                               fingerprint_scheme=SCHEME)


def _described(found: Vector | Caps) -> str:
    from jaxpersona.vectors.caps import Caps

    if isinstance(found, Caps):
        return (f"caps {found.name!r}; number: {len(found.layers)}; layers: "
                f"{', '.join(map(str, sorted(set(found.layers))))}; width: {found.values.shape[1]}")
    return f"{found.kind} {found.name!r}, {found.n_layers} layers, width {found.values.shape[1]}"


def _show_facts(found: Vector | Caps, shape: str) -> None:
    from rich.table import Table

    from jaxpersona.export import others

    table = Table("field", "value", show_header=False)
    facts = {"kind": found.kind, "name": found.name, "model": found.model or "unknown",
             "fingerprint": (f"{found.fingerprint} (scheme {found.fingerprint_scheme})"
                             if found.fingerprint else "unknown"),
             "site": getattr(found, "site", "residual"), "layers": "zero-based, after the block",
             "shape": shape}
    facts |= others(found.notes, list(facts))
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
    """Print the first experiment in full, and one line for each other experiment."""
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
