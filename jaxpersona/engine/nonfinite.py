"""Diagnosis of non-finite activations: the first affected site, the probable cause and a fix.

A compiled program reports only which rows are affected (`Carry.finite`). To find the first affected
layer, one of these rows is run again, and the norms of its activations are captured at every site.
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
    """A warning that names the first site of NaN or infinite activations and suggests a fix."""


def check_choice(value: Any) -> None:
    """Check the value of `on_nonfinite`.

    Raises:
      UserError: the value is neither "warn" nor "raise".
    """
    if value not in ("warn", "raise"):
        raise UserError(f"on_nonfinite is {value!r}; it must be 'warn' or 'raise'")


def explain(model: Model, row: Row, edits: Interventions, name: str, summary: str) -> str:
    """Return a one-line message with a row's first non-finite site, the probable cause and a fix.

    Args:
      model: the model.
      row: the encoded conversation, including the reply if there is one.
      edits: the interventions on the row, created without `rows=` or with one row.
      name: a description of the row for the message, such as "conversation 3".
      summary: the beginning of the message, which describes all affected rows, such as "2 of 16
        replies ended because of".
    """
    site = first_site(model, row, edits)
    if site is None:
        place = "after the last layer"
    else:
        layer, module, token = site
        place = f"at layer {layer} ({module}), token {token}"
    return (f"{summary} NaN or infinite activations, first {place}, in {name}: "
            f"{_cause(model, row, edits)}")


def first_site(model: Model, row: Row, edits: Interventions) -> tuple[int, str, int] | None:
    """Return the first (layer, site, token) whose activation norm is not finite in float32.

    The result is None if all norms are finite.
    """
    count = row.tokens.size
    rows = rows_divisor(model.params.like)
    batch = make_batch([row.tokens] * rows, kind=[row.kind] * rows, turn=[row.turn] * rows,
                       width=bucket(count))
    edits = edits.take(np.zeros(rows, np.int32))
    read = functools.reduce(operator.or_, (norms(site=site, name=site) for site in _SITES))
    out = _forward(model.params, model.config, jax.tree.map(jnp.asarray, batch),
                   interventions=edits, capture=read, logits=None)
    measured = processes.fetch({name: state.values for name, state in out.captured.items()})
    for layer in range(model.config.n_layers):
        for site in _SITES:
            bad = np.flatnonzero(~np.isfinite(measured[site][layer, 0, :count]))
            if bad.size:
                return layer, site, int(bad[0])
    return None


def damaged_parameter(params: Params) -> str | None:
    """Return the name of the first parameter with a non-finite value, or None."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    checks = [jnp.isfinite(x).all() for _, x in leaves]
    finite = processes.fetch(checks)
    bad = (path for (path, _), ok in zip(leaves, finite, strict=True) if not bool(ok))
    path = next(bad, None)
    return None if path is None else jax.tree_util.keystr(path).lstrip(".")


def _cause(model: Model, row: Row, edits: Interventions) -> str:
    """Return the probable cause and a fix, for the message."""
    damaged = damaged_parameter(model.params)
    if damaged is not None:
        return (f"the parameter {damaged} of {model.name} has non-finite values; download or "
                "convert the checkpoint again")
    if edits.edits and first_site(model, row, Interventions()) is None:
        return ("without the interventions the activations are finite; use a smaller scale, "
                "factor or bound")
    dtype = model.params.like.dtype.name
    if dtype == "float16":
        return ("activations probably exceed the largest float16 value, 65504; load the model "
                "with dtype='bfloat16' or 'float32'")
    return (f"the activations overflow {dtype}, probably because the weights of {model.name} are "
            "too large; the checkpoint may be damaged, or its training may have diverged")
