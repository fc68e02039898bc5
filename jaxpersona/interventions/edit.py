"""Tables of rank-one edits. Edits are data, so changing them does not trigger recompilation.

An edit computes p = ⟨h, v̂⟩ in float32, δ = clip((s − 1)·p + c, lo − p, hi − p) and h ← h + δ·v̂.
With a push direction û, h ← h + δ·û. The coefficients (s, c, lo, hi) determine the operator, such
as `steer`, `cap` or `ablate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.distributed.sharding import on_cpu
from jaxpersona.interventions.describe import host_array
from jaxpersona.interventions.table import (
    Prepared,
    Site,
    Table,
    checked_index,
    common,
    next_power,
)
from jaxpersona.kernels.edit import SiteEdit
from jaxpersona.kernels.reference import rank_one_edit, twice
from jaxpersona.runtime import is_traced

if TYPE_CHECKING:
    from jaxtyping import Array, Float

IDENTITY = (1.0, 0.0, -np.inf, np.inf)


class Edit(Table, kw_only=True, repr=False):
    """A table of rank-one edits.

    Attributes:
      direction: v̂ [l, n, D] float32, unit length.
      coefficients: (s, c, lo, hi) [l, n, 4] float32.
      push: û [l, n, D] float32, the direction along which h moves, or None to move h along v̂.
    """

    PAYLOAD: ClassVar[dict[str, int]] = {"direction": 1, "coefficients": 1, "push": 1}

    direction: Float[Array, "l n D"]
    coefficients: Float[Array, "l n 4"]
    push: Float[Array, "l n D"] | None = None

    @property
    def width(self) -> int:
        """The width D of the directions."""
        return self.direction.shape[-1]

    @property
    def key(self) -> tuple:
        """The table's structure (see `Table.key`), including whether it has a push direction."""
        return (*super().key, self.push is not None)

    def _prepared(self, like: jax.Array) -> PreparedEdit:
        """Split the table by layer; on a CPU, also precompute `reference.twice` for each layer."""
        cpu = on_cpu(like)
        return PreparedEdit(
            where=self.where, gate=self.gate, layers=self.layers, site=self.site,
            by_layer=tuple(LayerEdit(
                direction=self.direction[i],
                # compiled for a TPU, four arrays [n] of all layers are loaded together, but one
                # array [n, 4] is loaded again in each layer
                coefficients=tuple(self.coefficients[i, :, k] for k in range(4)),
                push=None if self.push is None else self.push[i],
                columns=twice(self.direction[i]) if cpu else None,
            ) for i in range(len(self.layers))))

    def identities(self, layers: int, size: int) -> dict[str, np.ndarray]:
        """Return entries that leave h unchanged (see `Table.identities`)."""
        return _identities(layers, size, self.width, self.push is not None)

    def operator(self) -> str:
        """Return the operator's name, such as "cap".

        The name is "reserve" if all entries are padding, and "rank_one" if the operator has no
        name, differs between entries or cannot be determined because the values cannot be read.
        """
        values, tests = host_array(self.coefficients), host_array(self.where)
        if values is None or tests is None or values.ndim != 3:
            return "rank_one"
        used = values[:, tests[:, 0] >= 0].reshape(-1, 4)  # exclude padding
        changing = used[(used != np.array(IDENTITY, np.float32)).any(-1)]
        names = {_operator(*map(float, row)) for row in changing} or {
            "steer" if len(used) else "reserve"}
        return names.pop() if len(names) == 1 else "rank_one"


def _operator(s: float, c: float, lo: float, hi: float) -> str:
    """Return the name of the operator with these coefficients, or "rank_one" if it has no name."""
    free = (lo, hi) == (-np.inf, np.inf)
    if s == 1:
        return "steer" if free else "cap" if c == 0 else "rank_one"
    if not free:
        return "rank_one"
    if s == 0:
        return "ablate" if c == 0 else "set_projection"
    return "scale" if c == 0 else "rank_one"


class LayerEdit(flax.struct.PyTreeNode):
    """The rank-one edits of one layer, one per row or one for all rows.

    Attributes:
      direction: v̂ [B or 1, D] float32, unit length.
      coefficients: s, c, lo and hi, each [B or 1] float32.
      push: û [B or 1, D] float32, along which h moves, or None to move h along v̂.
      columns: `reference.twice(direction)`, [B or 1, 2, D] float32, on a CPU, else None.
    """

    direction: Float[Array, "B D"]
    coefficients: tuple[Float[Array, " B"], ...]
    push: Float[Array, "B D"] | None = None
    columns: Float[Array, "B 2 D"] | None = None


class PreparedEdit(Prepared, kw_only=True):
    """A prepared table of rank-one edits, split by layer.

    Attributes:
      by_layer: the edits of each layer in `layers`.
    """

    by_layer: tuple[LayerEdit, ...]

    def apply(self, layer: int, h: jax.Array, active: jax.Array,
              before: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Edit the active tokens of h [B, T, D] (see `Prepared.apply`)."""
        edit = self.by_layer[self.layers.index(layer)]
        return rank_one_edit(h, edit.direction, edit.coefficients, active, edit.push, edit.columns)

    def at(self, layer: int, active: jax.Array) -> SiteEdit:
        """Combine the edit of one layer with a mask [B, T] of active tokens for `kernels.edit`."""
        edit = self.by_layer[self.layers.index(layer)]
        return SiteEdit(edit.direction, edit.coefficients, active, edit.push)


def table(
    direction: jax.Array | np.ndarray,
    coefficients: jax.Array | np.ndarray,
    where: np.ndarray,
    origin: np.ndarray,
    layers: tuple[int, ...],
    site: Site,
    index: np.ndarray | None,
    push: jax.Array | np.ndarray | None = None,
) -> Edit:
    """Build an `Edit` with strongly typed arrays, padded so that n is a power of two.

    The padding entries leave h unchanged.

    Args:
      direction, push, coefficients: as in `Edit`, with n entries.
      where, origin: as in `Table`, with n entries.
      layers, site: as in `Table`.
      index: [B] integers in −1…n−1, or None.

    Raises:
      UserError: `index` is not a list of integers, or an index is outside −1…n−1.
    """
    n, width = direction.shape[1:]
    index = checked_index(index, n)
    size = next_power(n)
    xp: Any = jnp if is_traced(direction, coefficients, push) else np
    given: dict[str, Any] = {"direction": direction, "coefficients": coefficients, "push": push}
    payload = {
        name: jnp.asarray(xp.concatenate([given[name], fill.astype(given[name].dtype)], 1),
                          jnp.float32)
        for name, fill in _identities(len(layers), size - n, width, push is not None).items()
    }
    return Edit(**payload, layers=layers, site=site, **common(where, origin, index, size))


def _identities(layers: int, size: int, width: int, push: bool) -> dict[str, np.ndarray]:
    """Return entries [l, n, …] that leave h unchanged, with or without a push direction."""
    unit = np.zeros((layers, size, width), np.float32)
    unit[..., 0] = 1.0
    numbers = np.broadcast_to(np.array(IDENTITY, np.float32), (layers, size, 4)).copy()
    fields = {"direction": unit, "coefficients": numbers}
    return {**fields, "push": unit.copy()} if push else fields
