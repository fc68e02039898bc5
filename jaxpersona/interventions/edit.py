"""Tables of rank-one edits; the edit of each row is data, so changing it does not recompile.

With p = ⟨h, v̂⟩ in float32, δ = clip((s − 1)·p + c, lo − p, hi − p) and h ← h + δ·v̂. The
coefficients (s, c, lo, hi) select steering, capping, ablation, scaling or a set projection.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.distributed.sharding import on_cpu
from jaxpersona.interventions.table import (
    Site,
    Table,
    checked_index,
    common,
    next_power,
    traced,
)
from jaxpersona.kernels import api
from jaxpersona.kernels.reference import twice

IDENTITY = (1.0, 0.0, -np.inf, np.inf)


class Edit(Table, kw_only=True):
    """A table of rank-one edits.

    Attributes:
      direction: v̂ [l, n, D] float32, unit length.
      coefficients: (s, c, lo, hi) [l, n, 4] float32.
      push: û [l, n, D] float32, to move h along û instead of v̂, or None for v̂.
    """

    PAYLOAD: ClassVar[dict[str, int]] = {"direction": 1, "coefficients": 1, "push": 1}

    direction: Any
    coefficients: Any
    push: Any = None

    @property
    def width(self) -> int:
        """The width D of the directions."""
        return self.direction.shape[-1]

    @property
    def key(self) -> tuple:
        """Kind, site, gate, and whether there is a push."""
        return (*super().key, self.push is not None)

    def apply(self, layer: int, h: jax.Array, active: jax.Array,
              before: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Edit h [B, T, D] where `active` [B, T]; also return where it changed (`Table.apply`)."""
        slot = self.layers.index(layer)
        part = self._part(slot) if self.parts is None else self.parts[slot]
        return api.rank_one_edit(h, active=active, **part)

    def apart(self, like: jax.Array) -> Self:
        """Split the table by layer; on a CPU, also precompute `reference.twice`."""
        parts = [self._part(slot) for slot in range(len(self.layers))]
        if on_cpu(like):
            parts = [{**part, "columns": twice(part["direction"])} for part in parts]
        return self.replace(parts=tuple(parts))

    def _part(self, slot: int) -> dict[str, Any]:
        # separate coefficients: TPUs then read them for all layers at once, not layer by layer
        return {"direction": self.direction[slot],
                "coefficients": tuple(self.coefficients[slot, :, i] for i in range(4)),
                "push": None if self.push is None else self.push[slot]}

    @classmethod
    def identities(cls, layers: int, size: int, like: Self) -> dict[str, np.ndarray]:
        """Return entries that leave h unchanged (see `Table.identities`)."""
        unit = np.zeros((layers, size, like.width), np.float32)
        unit[..., 0] = 1.0
        numbers = np.broadcast_to(np.array(IDENTITY, np.float32), (layers, size, 4)).copy()
        out = {"direction": unit, "coefficients": numbers}
        return out if like.push is None else {**out, "push": unit.copy()}


def table(
    direction: Any,
    coefficients: Any,
    where: np.ndarray,
    origin: np.ndarray,
    layers: tuple[int, ...],
    site: Site,
    index: np.ndarray | None,
    push: Any = None,
) -> Edit:
    """Build an `Edit` of strongly typed arrays, padded with identities to a power of two.

    Args:
      direction: [l, n, D]; coefficients: [l, n, 4]; where: [n, 5]; origin: [n].
      push: [l, n, D] or None.
      index: [B] integers in −1…n−1, or None.

    Raises:
      UserError: an index outside −1…n−1.
    """
    n = direction.shape[1]
    index = checked_index(index, n)
    size = next_power(n)
    made = Edit(
        direction=direction, coefficients=coefficients, push=push,
        layers=layers, site=site, **common(where, origin, index, size),
    )
    fill = Edit.identities(len(layers), size - n, made)
    xp = jnp if traced(direction, coefficients, push) else np

    def padded(name: str) -> jax.Array:
        rest = fill[name].astype(getattr(made, name).dtype)
        return jnp.asarray(xp.concatenate([getattr(made, name), rest], 1), jnp.float32)

    return made.replace(**{name: padded(name) for name in fill})
