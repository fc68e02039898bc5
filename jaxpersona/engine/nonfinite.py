"""Explain activations that are not finite: where they begin, why, and what helps.

A program only reports which rows were hit (`carry.Carry.finite`),
which costs nothing. The first layer is found afterwards: one such row runs again, and its norms are
read at every site.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.capture import norms
from jaxpersona.distributed import processes
from jaxpersona.distributed.sharding import rows_divisor
from jaxpersona.engine.compiled import program
from jaxpersona.engine.prompts import bucket
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.table import ORDER
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.models.forward import forward
from jaxpersona.models.params import Params
from jaxpersona.text.chat import Row

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

OnNonfinite = Literal["warn", "raise"]
_SITES = sorted(ORDER, key=ORDER.__getitem__)
_forward = program(static=("logits",))(forward)


class NonfiniteWarning(RuntimeWarning):
    """Activations or logits were NaN or infinite; the message says where and what helps."""


def check_choice(value: Any) -> None:
    """Refuse a value of `on_nonfinite` that does not exist.

    Raises:
      UserError: it is neither "warn" nor "raise".
    """
    if value not in ("warn", "raise"):
        raise UserError(f"on_nonfinite is {value!r}; it must be 'warn' or 'raise'")


def explain(model: Model, row: Row, edits: Interventions, what: str, result: str) -> str:
    """Say in one line where a row's activations stop being finite, and what helps.

    Args:
      model: the model.
      row: the row's tokens, those of its reply included.
      edits: what was done to it, for one row or for all alike.
      what: how the row is called, as "conversation 3".
      result: what is said of all such rows, as "2 of 16 replies ended at".
    """
    found = first_site(model, row, edits)
    if found is None:
        where = "after the last layer"
    else:
        layer, site, token = found
        where = f"at layer {layer} ({site}), token {token}"
    return (f"{result} NaN or infinite activations, first {where}, in {what}: "
            f"{_cause(model, row, edits)}")


def first_site(model: Model, row: Row, edits: Interventions) -> tuple[int, str, int] | None:
    """Return the first (layer, site) at which ‖h‖ is not finite in float32 and the first such token
    there, or None where all are."""
    count = row.tokens.size
    rows = rows_divisor(model.params.embed_vd)
    batch = make_batch([row.tokens] * rows, kind=[row.kind] * rows, turn=[row.turn] * rows,
                       width=bucket(count))
    edits = edits.take(np.zeros(rows, np.int32))
    read = functools.reduce(operator.or_, (norms(site=site, name=site) for site in _SITES))
    out = _forward(model.params, model.config, jax.tree.map(jnp.asarray, batch),
                   interventions=edits, capture=read, logits=None)
    found = processes.fetch({name: state.values for name, state in out.captured.items()})
    for layer in range(model.config.n_layers):
        for site in _SITES:
            bad = np.flatnonzero(~np.isfinite(found[site][layer, 0, :count]))
            if bad.size:
                return layer, site, int(bad[0])
    return None


def damaged_parameter(params: Params) -> str | None:
    """Name the first parameter that holds a value which is not finite, or return None."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    checks = [jnp.isfinite(x).all() for _, x in leaves]
    fine = processes.fetch(checks)
    bad = (path for (path, _), ok in zip(leaves, fine, strict=True) if not bool(ok))
    path = next(bad, None)
    return None if path is None else jax.tree_util.keystr(path).lstrip(".")


def _cause(model: Model, row: Row, edits: Interventions) -> str:
    """Name the cause and what helps against it."""
    damaged = damaged_parameter(model.params)
    if damaged is not None:
        return (f"the parameter {damaged} of {model.name} is not finite; download or convert the "
                "checkpoint anew")
    if edits.edits and first_site(model, row, Interventions()) is None:
        return ("without the interventions they are finite; give these a smaller scale, factor or "
                "bound")
    dtype = model.params.embed_vd.dtype.name
    if dtype == "float16":
        return ("float16 ends at 65504; load the model with dtype='bfloat16' or 'float32'")
    return (f"they exceed {dtype}; the weights of {model.name} are too great, as those of a "
            "damaged checkpoint or of a diverged training")
