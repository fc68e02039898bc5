"""What may be done to an activation: rank-one edits as data, where they act, how they compose."""

from jaxpersona.interventions.compose import Interventions, chain, stack_rows
from jaxpersona.interventions.edit import SITES, Edit, Site
from jaxpersona.interventions.operators import cap, resolve_layers, steer
from jaxpersona.interventions.where import Where, holds, turns

__all__ = [
    "SITES", "Edit", "Interventions", "Site", "Where", "cap", "chain", "holds", "resolve_layers",
    "stack_rows", "steer", "turns",
]
