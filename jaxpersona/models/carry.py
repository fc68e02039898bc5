"""The state that a forward pass returns for the next call on the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.struct

from jaxpersona.brief import brief
from jaxpersona.models.cache import Cache

if TYPE_CHECKING:
    from jaxtyping import Array, Bool

    from jaxpersona.interventions.trace import Applied, Gates


class Carry(flax.struct.PyTreeNode):
    """The state of B batch rows between two calls of `forward`.

    `forward` returns a `Carry` with every field set, except that `cache` is None if no cache was
    allocated. If a field of the `Carry` passed to `forward` is None, `forward` starts with the
    initial value of this field: `Carry(cache=cache)` continues only the cache, and
    `carry.replace(captured=None)` restarts the readings.

    Attributes:
      cache: the keys and values of the tokens processed so far, or None.
      captured: the state of each reading by name; its `value` is the result of the reading.
      applied: one `Applied` per intervention table, with counts summed over all calls so far.
      gates: the state of each prompt gate, by the index of the gate's intervention table, as a
        string such as "0".
      finite: [B] bool, True if the residual stream after the last computed block was finite at
        every valid token of all calls, and its sum of squares was finite in float32.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.Carry(cache=jp.init_cache(jp.load("mini").config, rows=1, slots=16)).captured is None
      True
    """

    __repr__ = brief

    cache: Cache | None = None
    captured: dict[str, Any] | None = None
    applied: tuple[Applied, ...] | None = None
    gates: Gates | None = None
    finite: Bool[Array, " B"] | None = None
