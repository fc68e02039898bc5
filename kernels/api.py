"""Dispatch of the rank-one edit to a named implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
from jaxpersona.kernels import reference

from jaxpersona.errors import UserError

Implementation = Literal["xla"]


def rank_one_edit(
    h: jax.Array,
    direction: jax.Array,
    coefficients: Sequence[jax.Array],
    active: jax.Array,
    push: jax.Array | None = None,
    columns: jax.Array | None = None,
    *,
    implementation: Implementation = "xla",
) -> tuple[jax.Array, jax.Array]:
    """Apply `reference.rank_one_edit` with the named implementation.

    Raises:
      UserError: unknown implementation.
    """
    if implementation != "xla":
        raise UserError(f"implementation is {implementation!r}; only 'xla' is available")
    return reference.rank_one_edit(h, direction, coefficients, active, push, columns)
