"""The command `jaxpersona generate`: generate replies, with or without interventions."""

from __future__ import annotations

import math
import pathlib
from typing import Annotated, Any

import typer

from jaxpersona.cli import caps, support
from jaxpersona.cli.output import cell, console, say
from jaxpersona.cli.support import AdapterOption, DtypeOption, ModelOption, progress
from jaxpersona.errors import UserError


def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more user messages.")],
    model: ModelOption = "mini",
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    cap: Annotated[pathlib.Path | None, typer.Option(help="A file of an axis, or of caps.")] = None,
    cap_layers: Annotated[str | None, typer.Option(help="Half-open, e.g. 46:54; default: the upper "
                                                        "half of the layers.")] = None,
    percentile: Annotated[str | None, typer.Option(help="Floor of --cap; default: p25.")] = None,
    of: Annotated[str | None, typer.Option(help="The population of the percentile; default: "
                                                "default.")] = None,
    experiment: Annotated[str | None, typer.Option(help="Which experiment of a capping_config.pt.")
                          ] = None,
    check: Annotated[bool, typer.Option(help="Test the caps on short replies first.")] = True,
    steer: Annotated[pathlib.Path | None, typer.Option(help="A vector file to add.")] = None,
    steer_layers: Annotated[str | None, typer.Option(help="E.g. 16 or 14:18; default: the middle.")
                            ] = None,
    scale: float = 1.0,
    spec: Annotated[pathlib.Path | None, typer.Option(
        help="A JSON file of interventions, applied last.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also show the replies without "
                                                            "interventions.")] = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Generate replies, with caps, steering, other interventions, or none."""
    from rich.table import Table

    from jaxpersona.ckpts.vectors import load_vector
    from jaxpersona.engine.generate import generate as run
    from jaxpersona.engine.prompts import check_settings
    from jaxpersona.engine.sampling import sampling
    from jaxpersona.interventions import chain, resolve_layers
    from jaxpersona.interventions import steer as add
    from jaxpersona.interventions.bank import parse_layers
    from jaxpersona.vectors.caps import fitted

    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature,
                                "top_p": top_p, "seed": seed}
    sampling(1, temperature=temperature, top_p=top_p, seed=seed)
    check_settings(max_new_tokens=max_new_tokens)
    if not math.isfinite(scale):
        raise UserError(f"--scale is {scale}; it must be finite")
    for layers in (cap_layers, steer_layers):
        if layers is not None:
            parse_layers(layers)
    if blank := [text for text in prompt if not text.strip()]:
        raise UserError(f"prompt is {blank[0]!r}; give a message that is not blank")
    given = {"--cap-layers": cap_layers, "--percentile": percentile, "--of": of,
             "--experiment": experiment}
    idle = [name for name, value in given.items() if value is not None]
    missing = []
    if idle and cap is None:
        missing.append(f"{', '.join(idle)} need{'s' * (len(idle) == 1)} --cap")
    if steer_layers is not None and steer is None:
        missing.append("--steer-layers needs --steer")
    if missing:
        raise UserError(", and ".join(missing))
    held = caps.open_caps(cap, given) if cap else None
    vector = load_vector(steer) if steer else None
    asked = caps.read_spec(spec) if spec else None
    if compare and held is None and vector is None and asked is None:
        raise UserError("--compare needs something to compare: give --cap, --steer or --spec")
    loaded = support.open_model(model, dtype, None, adapter)
    total = loaded.config.n_layers
    if vector is not None:
        vector = fitted(vector, loaded.config, loaded.name, loaded.fingerprint)
    at = total // 2 if steer_layers is None else resolve_layers(steer_layers, total)
    edits = chain(
        None if vector is None else add(vector, layers=at, scale=scale),
        None if held is None else caps.cap_edits(loaded, held, cap_layers, percentile, of, check),
        None if spec is None else caps.spec_edits(loaded, asked, spec, check),
    )
    head = [] if system is None else [{"role": "system", "content": system}]
    talks = [[*head, {"role": "user", "content": text}] for text in prompt]
    with progress() as report:
        def count_replies(done: int, count: int, tokens: int) -> None:
            report("generate", done, count, tokens)

        size = min(32, len(talks))
        settings = {**settings, "batch_size": size, "on_nonfinite": "raise"}
        out = run(loaded, talks, interventions=edits, progress=count_replies, **settings)
        plain = run(loaded, talks, **settings) if compare else None
    if plain is None:
        say(*out.text)
    else:
        table = Table("prompt", "without", "with", show_lines=True)
        for text, before, after in zip(prompt, plain.text, out.text, strict=True):
            table.add_row(cell(text), cell(before), cell(after))
        console().print(table)
    for table, applied in enumerate(out.applied):
        say(f"intervention {table}: {int(applied.seen.sum())} tokens seen, "
            f"{int(applied.changed.sum())} changes over {applied.changed.shape[0]} layers",
            error=True)
