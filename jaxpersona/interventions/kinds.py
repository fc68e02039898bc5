"""Tables of edits that are not rank-one: rotations, norm restorations and custom functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.errors import UserError
from jaxpersona.interventions.table import Prepared, Table

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree

F32 = jnp.float32


class Rotation(Table, kw_only=True, repr=False):
    """A table of rotations, each within its own plane.

    A rotation preserves ‖h‖ and the component of h orthogonal to the plane.

    Attributes:
      first, second: b₁ and b₂ [l, n, D] float32, an orthonormal basis of each plane.
      angle: (cos θ, sin θ, to) [l, n, 3] float32; `to` is 1 if θ is measured from b₁, and 0 if θ
        is measured from the projection of h onto the plane.
    """

    PAYLOAD: ClassVar[dict[str, int]] = {"first": 1, "second": 1, "angle": 1}

    first: Float[Array, "l n D"]
    second: Float[Array, "l n D"]
    angle: Float[Array, "l n 3"]

    @property
    def width(self) -> int:
        """The width D of the basis vectors."""
        return self.first.shape[-1]

    def _prepared(self, like: jax.Array) -> PreparedRotation:
        return PreparedRotation(where=self.where, gate=self.gate, layers=self.layers,
                                site=self.site, first=self.first, second=self.second,
                                angle=self.angle)

    def identities(self, layers: int, size: int) -> dict[str, np.ndarray]:
        """Return rotations by an angle of 0 (see `Table.identities`)."""
        planes = np.zeros((2, layers, size, self.width), np.float32)
        planes[0, ..., 0] = planes[1, ..., -1] = 1.0
        angle = np.broadcast_to(np.array([1, 0, 0], np.float32), (layers, size, 3)).copy()
        return {"first": planes[0], "second": planes[1], "angle": angle}

    def operator(self) -> str:
        """Return "rotate"."""
        return "rotate"


class PreparedRotation(Prepared, kw_only=True):
    """A prepared table of rotations; its arrays are as in `Rotation`, with B or 1 entries."""

    first: Float[Array, "l B D"]
    second: Float[Array, "l B D"]
    angle: Float[Array, "l B 3"]

    def apply(self, layer: int, h: jax.Array, active: jax.Array,
              before: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rotate the active tokens of h [B, T, D] (see `Prepared.apply`)."""
        slot = self.layers.index(layer)
        cos, sin, to = (self.angle[slot][:, i, None] for i in range(3))
        wide = h.astype(F32)
        one, two = (jnp.broadcast_to(b[slot][:, None], h.shape) for b in (self.first, self.second))
        p, q = (jnp.einsum("btd,btd->bt", wide, b, precision="highest") for b in (one, two))
        inside = p * p + q * q
        positive = inside > 0  # the square root is not differentiable at 0
        radius = jnp.where(positive, jnp.sqrt(jnp.where(positive, inside, 1.0)), 0.0)
        x, y = jnp.where(to > 0, radius, p), jnp.where(to > 0, 0.0, q)
        dp, dq = x * cos - y * sin - p, x * sin + y * cos - q
        changed = active & ((dp != 0) | (dq != 0))
        turned = (wide + dp[..., None] * one + dq[..., None] * two).astype(h.dtype)
        return jnp.where(changed[..., None], turned, h), changed


class NormRestoration(Table, kw_only=True, repr=False):
    """A table of edits that reset the norm of h to its value before all edits at the same site.

    Attributes:
      amount: [l, n] float32, 1 to restore the norm or 0 for no change.
    """

    PAYLOAD: ClassVar[dict[str, int]] = {"amount": 1}

    amount: Float[Array, "l n"]

    def _prepared(self, like: jax.Array) -> PreparedNormRestoration:
        return PreparedNormRestoration(where=self.where, gate=self.gate, layers=self.layers,
                                       site=self.site, amount=self.amount)

    def identities(self, layers: int, size: int) -> dict[str, np.ndarray]:
        """Return entries that leave the norm unchanged (see `Table.identities`)."""
        return {"amount": np.zeros((layers, size), np.float32)}

    def operator(self) -> str:
        """Return "restore_norm"."""
        return "restore_norm"


class PreparedNormRestoration(Prepared, kw_only=True):
    """A prepared table of norm restorations; `amount` is [l, B] or [l, 1]."""

    amount: Float[Array, "l B"]

    def apply(self, layer: int, h: jax.Array, active: jax.Array,
              before: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rescale the active tokens of h [B, T, D] (see `Prepared.apply`)."""
        slot = self.layers.index(layer)
        wide, was = h.astype(F32), before.astype(F32)
        now = (wide * wide).sum(-1)
        factor = jnp.sqrt((was * was).sum(-1) / jnp.where(now > 0, now, 1.0))
        # if the norm overflows, use NaN: dividing by infinity would silently set h to zero
        factor = jnp.where(jnp.isfinite(now), factor, jnp.nan)
        changed = active & (self.amount[slot][:, None] > 0) & (factor != 1) & (now > 0)
        return jnp.where(changed[..., None], (wide * factor[..., None]).astype(h.dtype), h), changed


class Custom(Table, kw_only=True, repr=False):
    """A table of edits that apply a user-defined function to the activation of each token.

    Attributes:
      params: a pytree of arrays [n, …], the function's parameters.
      on: [l, n] float32, 1 if the entry applies at the layer, else 0.
      fn: the function fn(params, h) → h (static). Its arguments are the parameters of one entry and
        the activation [D] float32 of one token.
    """

    PAYLOAD: ClassVar[dict[str, int]] = {"params": 0, "on": 1}

    params: PyTree
    on: Float[Array, "l n"]
    fn: Callable[[Any, jax.Array], jax.Array] = flax.struct.field(pytree_node=False)

    @property
    def key(self) -> tuple:
        """The table's structure (`Table.key`), the function, and its parameters' structure."""
        leaves, tree = jax.tree.flatten(self.params)
        forms = tuple((x.shape[1:], str(x.dtype)) for x in leaves)
        return (*super().key, self.fn, tree, forms)

    def _prepared(self, like: jax.Array) -> PreparedCustom:
        return PreparedCustom(where=self.where, gate=self.gate, layers=self.layers,
                              site=self.site, params=self.params, on=self.on, fn=self.fn)

    def identities(self, layers: int, size: int) -> dict[str, np.ndarray]:
        """Return the field `on` for entries that apply at no layer (see `Table.identities`)."""
        return {"on": np.zeros((layers, size), np.float32)}

    def operator(self) -> str:
        """Return "custom"."""
        return "custom"


class PreparedCustom(Prepared, kw_only=True):
    """A prepared table of a custom function; its fields are as in `Custom`, with B or 1 entries."""

    params: PyTree
    on: Float[Array, "l B"]
    fn: Callable[[Any, jax.Array], jax.Array] = flax.struct.field(pytree_node=False)

    def apply(self, layer: int, h: jax.Array, active: jax.Array,
              before: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Apply the function to the active tokens of h [B, T, D] (see `Prepared.apply`).

        Raises:
          UserError: the function returns an array whose shape is not [D].
        """
        slot = self.layers.index(layer)
        by_token = jax.vmap(self.fn, in_axes=(None, 0))
        shared = self.on.shape[1] == 1
        params = jax.tree.map(lambda x: x[0], self.params) if shared else self.params
        new = jax.vmap(by_token, in_axes=(None if shared else 0, 0))(params, h.astype(F32))
        if new.shape != h.shape:
            raise UserError(f"fn returned shape {list(new.shape[2:])} for a token; it must return "
                            f"shape [{h.shape[-1]}]")
        new = new.astype(h.dtype)
        changed = active & (self.on[slot][:, None] > 0) & (new != h).any(-1)
        return jnp.where(changed[..., None], new, h), changed
