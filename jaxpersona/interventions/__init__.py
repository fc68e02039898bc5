"""What may be done to an activation: rank-one edits as data, where they act, how they compose."""

from jaxpersona.interventions.compose import Interventions, chain, stack_rows
from jaxpersona.interventions.edit import SITES, Edit, Site
from jaxpersona.interventions.operators import (
    ablate,
    cap,
    resolve_layers,
    scale,
    set_projection,
    steer,
)
from jaxpersona.interventions.where import Where, holds, turns

__all__ = [
    "Edit", "Interventions", "SITES", "Site", "Where", "ablate", "cap", "chain", "holds",
    "resolve_layers", "scale", "set_projection", "stack_rows", "steer", "turns",
]
