"""The command `jaxpersona chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from jaxpersona.cli import edits as options
from jaxpersona.cli import support
from jaxpersona.cli.support import AdapterOption, DtypeOption, ModelOption


def chat(
    model: ModelOption = "mini",
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    cap: options.CapOption = None,
    cap_layers: options.CapLayersOption = None,
    percentile: options.PercentileOption = None,
    of: options.OfOption = None,
    experiment: options.ExperimentOption = None,
    check: options.CheckOption = True,
    steer: options.SteerOption = None,
    steer_layers: options.SteerLayersOption = None,
    scale: float = 1.0,
    spec: options.SpecOption = None,
    where: options.WhereOption = None,
    axis: options.AxisOption = None,
    axis_layers: options.AxisLayersOption = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Chat with a model in the terminal, and show the projection of each reply onto a direction.

    The direction is that of --axis or, without --axis, the axis of --cap. With neither option, no
    projections are shown. In the chat, /help lists the commands.
    """
    from jaxpersona.cli.dialogue import Dialogue
    from jaxpersona.engine.prompts import check_settings
    from jaxpersona.engine.sampling import sampling
    from jaxpersona.persona.session import Session

    sampling(1, temperature=temperature, top_p=top_p, seed=seed)
    check_settings(max_new_tokens=max_new_tokens)
    asked = options.Edits(cap, cap_layers, percentile, of, experiment, check, steer, steer_layers,
                          scale, spec, where, axis, axis_layers).read()
    loaded = support.open_model(model, dtype, None, adapter)
    session = Session(loaded, interventions=asked.build(loaded),
                      monitor=asked.monitor(loaded, default=True), system=system,
                      max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                      seed=seed)
    Dialogue(session).run()
