"""The command `jaxpersona chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from jaxpersona.cli import support
from jaxpersona.cli.edits import EditOptions, Edits
from jaxpersona.cli.groups import grouped
from jaxpersona.cli.support import (
    AdapterOption,
    DtypeOption,
    LengthOption,
    ModelOption,
    SeedOption,
    TemperatureOption,
    TopPOption,
)


@grouped
def chat(
    model: ModelOption = "mini",
    system: Annotated[str | None, typer.Option(show_default="none", help="The system prompt.")
                      ] = None,
    edits: EditOptions = EditOptions(),
    max_new_tokens: LengthOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Chat with a model in the terminal, and show the projection of each reply onto a direction.

    The direction is read from the file of --axis or, without --axis, from the file of --cap if it
    contains an axis. Otherwise, no projections are shown. In the chat, /help lists the commands.
    """
    from jaxpersona.cli.dialogue import Dialogue
    from jaxpersona.engine.prompts import check_settings
    from jaxpersona.engine.sampling import sampling
    from jaxpersona.persona.session import Session

    sampling(1, temperature=temperature, top_p=top_p, seed=seed)
    check_settings(max_new_tokens=max_new_tokens)
    asked = Edits(**vars(edits)).read()
    loaded = support.open_model(model, dtype, None, adapter)
    session = Session(loaded, interventions=asked.build(loaded),
                      monitor=asked.monitor(loaded, default=True), system=system,
                      max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                      seed=seed)
    Dialogue(session).run()
