"""The rank-one edit as a table: which edit a row gets is data, so new ones never recompile.

With p = ⟨h, v̂⟩ in float32, δ = clip((s − 1)·p + c, lo − p, hi − p) and h ← h + δ·v̂. The four
numbers make it an addition, a cap, an ablation, a set or a scale. Structure, which compiles, is
only the site, the layers, and whether rows choose entries.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.batch import Batch
from jaxpersona.interventions.where import holds
from jaxpersona.kernels import api

Site = Literal["residual", "attention", "mlp"]
SITES: tuple[Site, ...] = ("residual", "attention", "mlp")
IDENTITY = (1.0, 0.0, -np.inf, np.inf)


@flax.struct.dataclass
class Edit:
    """A table of n rank-one edits at one site of l layers, and which of them each row uses.

    Attributes:
      direction: v̂ [l, n, D] float32, unit length.
      coefficients: (s, c, lo, hi) [l, n, 4] float32.
      where: encoded tests [n, 5] int32.
      push: û [l, n, D] float32, what h moves along instead of v̂, or None for v̂ itself.
      origin: [n] uint32, half a model's fingerprint; 0 where a direction does not say.
      index: [B] int32, the entry of each row, −1 for none; None: entry 0 for every row.
      layers, site: the structure.
      each: True once entry b belongs to row b (`by_row`).
    """

    direction: Any
    coefficients: Any
    where: Any
    origin: Any
    index: Any
    push: Any = None
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    site: Site = flax.struct.field(pytree_node=False, default="residual")
    each: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def entries(self) -> int:
        """The number of entries n, padding included."""
        return self.direction.shape[1]

    @property
    def key(self) -> tuple:
        """What two edits must share to become one table: kind, site and having a push."""
        return ("edit", self.site, self.push is not None)

    def by_row(self, rows: int) -> Edit:
        """Give row b its own entry b, so that a loop need not gather again.

        A shared edit stays shared: it has nothing to gather.
        """
        if self.index is None or self.each:
            return self
        here = self.index >= 0
        chosen = jnp.where(here, self.index, 0)
        identity = jnp.asarray(IDENTITY, jnp.float32)
        coefficients = self.coefficients.at[:, chosen].get(mode="fill", fill_value=0)
        return self.replace(  # pyright: ignore[reportAttributeAccessIssue]
            direction=self.direction.at[:, chosen].get(mode="fill", fill_value=0),
            coefficients=jnp.where(here[None, :, None], coefficients, identity[None, None]),
            where=jnp.where(here[:, None], self.where.at[chosen].get(mode="fill", fill_value=0),
                            jnp.asarray([[-1, 0, 0, 0, 0]], jnp.int32)),
            origin=self.origin.at[chosen].get(mode="fill", fill_value=0),
            push=None if self.push is None
            else self.push.at[:, chosen].get(mode="fill", fill_value=0),
            each=True,
        )

    def seen(self, batch: Batch) -> jax.Array:
        """[B, T] bool: the tokens on which the edit may act."""
        return holds(self.where, batch)

    def apply(self, layer: int, h: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Edit h [B, T, D] at `layer` where `active` [B, T]; also return where it changed."""
        slot = self.layers.index(layer)
        push = None if self.push is None else self.push[slot]
        return api.rank_one_edit(h, self.direction[slot], self.coefficients[slot], active, push)


def next_power(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def table(
    direction: np.ndarray,
    coefficients: np.ndarray,
    where: np.ndarray,
    origin: np.ndarray,
    layers: tuple[int, ...],
    site: Site,
    index: np.ndarray | None,
    push: np.ndarray | None = None,
) -> Edit:
    """Make an `Edit` of strong types, its entries padded to a power of two with identities.

    Args:
      direction: [l, n, D]; coefficients: [l, n, 4]; where: [n, 5]; origin: [n].
      push: [l, n, D] or None.
      index: [B] integers in −1…n−1, or None.

    Raises:
      ValueError: an index that is not one of the n entries (or −1).
    """
    n = direction.shape[1]
    if index is not None:
        index = np.asarray(index)
        if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
            raise ValueError("rows must be a list of integers, one a row (−1: no edit)")
        bad = sorted({int(i) for i in index if i >= n or i < -1})
        if bad:
            raise ValueError(f"rows has {bad}; the bank has entries 0…{n - 1} (−1: no edit)")
    extra = next_power(n) - n
    if extra:
        shape = (len(layers), extra)
        unit = np.zeros((*shape, direction.shape[2]))
        unit[..., 0] = 1.0
        direction = np.concatenate([direction, unit], 1)
        push = None if push is None else np.concatenate([push, unit], 1)
        identity = np.broadcast_to(np.array(IDENTITY), (*shape, 4))
        coefficients = np.concatenate([coefficients, identity], 1)
        where = np.concatenate([where, np.broadcast_to(where[:1], (extra, where.shape[1]))])
        origin = np.concatenate([origin, np.zeros(extra, origin.dtype)])
    return Edit(
        direction=jnp.asarray(direction, jnp.float32),
        coefficients=jnp.asarray(coefficients, jnp.float32),
        where=jnp.asarray(where, jnp.int32),
        origin=jnp.asarray(origin, jnp.uint32),
        index=None if index is None else jnp.asarray(index, jnp.int32),
        push=None if push is None else jnp.asarray(push, jnp.float32),
        layers=layers,
        site=site,
    )
