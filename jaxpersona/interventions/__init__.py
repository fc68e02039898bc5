"""Interventions: pytrees that specify edits to activations by site, layer, row, token and gate."""

from jaxpersona.interventions.bank import resolve_layers
from jaxpersona.interventions.compose import Interventions, chain, reserve, stack_rows
from jaxpersona.interventions.gating import gate
from jaxpersona.interventions.nonlinear import custom, restore_norm, rotate
from jaxpersona.interventions.operators import (
    ablate,
    cap,
    mean_ablate,
    scale,
    set_projection,
    steer,
)
from jaxpersona.interventions.sweeping import sweep
from jaxpersona.interventions.table import SITES, Site
from jaxpersona.interventions.where import Where, holds, turns

__all__ = [
    "Interventions", "SITES", "Site", "Where", "ablate", "cap", "chain", "custom", "gate", "holds",
    "mean_ablate", "reserve", "resolve_layers", "restore_norm", "rotate", "scale",
    "set_projection", "stack_rows", "steer", "sweep", "turns",
]
