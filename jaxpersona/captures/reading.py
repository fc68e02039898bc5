"""The base classes of readings, which reduce activations, and of their states.

A reading selects tokens, reduces their activations at each layer, and adds the reductions of each
call of `forward` to a state. `forward` is usually compiled by `jax.jit`, so the methods that it
calls must be traceable. docs/architecture.md ("Adding a reading") contains an example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import brief
from jaxpersona.captures.missing import warn_of_empty
from jaxpersona.distributed.sharding import spread_rows
from jaxpersona.interventions.describe import call, layer_range, tests
from jaxpersona.interventions.table import Site
from jaxpersona.interventions.where import holds
from jaxpersona.models.batch import Batch
from jaxpersona.models.cache import by_slot, set_lines

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt

F32 = jnp.float32


class State(flax.struct.PyTreeNode):
    """The values that a reading has accumulated for B rows; the base class of all states.

    A state is a pytree of arrays. A subclass declares `row_axes` and defines `result`.

    Attributes:
      row_axes: the batch axis of each leaf, in the order of `jax.tree.leaves`.
      per_token: whether the result is [B, L, S, …] with one entry per cache slot.
      label: the name of the reading in the warning about rows without a selected token.
    """

    __repr__ = brief

    row_axes: ClassVar[tuple[int, ...]]
    per_token: ClassVar[bool] = False
    label: ClassVar[str] = "capture"

    def result(self) -> Any:
        """Return the result [B, …], which is an array or a pytree of arrays.

        The arrays are NumPy arrays if the state consists of NumPy arrays, else JAX arrays.
        """
        raise NotImplementedError

    @property
    def value(self) -> Any:
        """The result [B, …]; a warning is logged if it is undefined for some rows."""
        warn_of_empty(self.label, self.empty)
        return self.result()

    @property
    def empty(self) -> Any:
        """[B] bool: True for rows whose result is undefined because no token was selected.

        By default, the result is assumed to be defined for every row.
        """
        return np.zeros(jax.tree.leaves(self)[0].shape[self.row_axes[0]], bool)


class Reading(flax.struct.PyTreeNode, kw_only=True):
    """A reduction of the activations of selected tokens; the base class of all readings.

    B is the number of rows, T the number of tokens per row in one call, L the number of layers that
    are read, S the number of cache slots and D the width of the residual stream.

    Attributes:
      where: the encoded token test [5] int32.
      layers: the layers that are read, in ascending order, or None for all layers (static).
      site: the site that is read (static).
      edited: True to read activations after the interventions at the same site and layer, False to
        read them before these interventions (static; see `Capture.before_edits`).
      label: the reading's name in its repr; by default, the class name in lower case.
      needs_token: whether the result is undefined for a row without a selected token.
    """

    label: ClassVar[str] = ""
    needs_token: ClassVar[bool] = False

    where: Int[Array, " 5"]
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    site: Site = flax.struct.field(pytree_node=False, default="residual")
    edited: bool = flax.struct.field(pytree_node=False, default=True)

    def init(self, layers: int, rows: int, slots: int, width: int) -> State:
        """Return the initial state, before any token is read.

        Args:
          layers, rows, slots: the numbers L, B and S.
          width: the width D of the residual stream.
        """
        raise NotImplementedError

    def weights(self, batch: Batch) -> Any:
        """Return the weights for `read` and `update`; by default, a token mask [B, T] bool."""
        return holds(self.where, batch)

    def read(self, h: jax.Array, weights: Any, index: int) -> Any:
        """Reduce the activations of one layer in one call.

        Args:
          h: [B, T, D], in the model's dtype.
          weights: the result of the method `weights`.
          index: the index of the layer among the layers that are read.

        Returns:
          An array or a pytree of arrays. `update` receives the results of all layers, stacked along
          a new first axis.
        """
        raise NotImplementedError

    def update(self, state: Any, reductions: Any, weights: Any, batch: Batch,
               slots: jax.Array) -> Any:
        """Add the reductions of one call to the state.

        A call of `forward` processes whole prompts, a chunk of each prompt, or one generated token
        per row. The result must not depend on how a text is divided into calls.

        Args:
          state: the state, of the type that `init` returns.
          reductions: the results of `read` at all layers, stacked along a first axis of length L.
          weights: the result of the method `weights`.
          batch: the call's B rows of T tokens.
          slots: [B, T] int32, the cache slot of each token; S or higher for padding.
        """
        raise NotImplementedError

    @property
    def origin(self) -> UInt[Array, " n"] | np.ndarray:
        """[n] uint32, a hash of the weights of each direction's model (`params.origin`).

        The value is 0 if the model is unknown, or if the reading has no directions.
        """
        return np.zeros(1, np.uint32)

    def check(self, layers: tuple[int, ...], width: int) -> None:
        """Check the reading against the layers that are read and the model's width D.

        By default, nothing is checked.

        Raises:
          UserError: an array has the wrong shape.
        """

    def details(self) -> list[str]:
        """Return the additional arguments that `__repr__` shows, such as ["turns=2"]."""
        return []

    def __repr__(self) -> str:
        """Return a summary in the form of a call, such as `mean(response, layers 4–7)`."""
        layers = "" if self.layers is None else layer_range(self.layers)
        site = "" if self.site == "residual" else self.site
        text = call(self.label or type(self).__name__.lower(), tests(self.where), layers, site,
                    *self.details())
        return text if self.edited else f"{text}.before_edits()"


class TokenState(State, repr=False):
    """One value per cache slot; NaN for slots without a selected token.

    Attributes:
      values: [L, B, S, …] float32.
    """

    __repr__ = brief

    row_axes: ClassVar[tuple[int, ...]] = (1,)
    per_token: ClassVar[bool] = True

    values: Float[Array, "L B S ..."]

    def result(self) -> Any:
        """Return the values [B, L, S, …]; entry s belongs to the token in cache slot s."""
        return numpy_of(self.values).moveaxis(self.values, 0, 1)


def numpy_of(x: Any) -> Any:
    """Return the module `numpy` if x is a NumPy array, else `jax.numpy`."""
    return np if isinstance(x, np.ndarray) else jnp


def write_slots(buffer: jax.Array, values: jax.Array, slots: jax.Array,
                axis: int = 2) -> jax.Array:
    """Write per-token values into the slots of a buffer, and return the new buffer.

    The values are scattered if there is one token per row, and gathered if there are several
    (see `cache.by_slot`).

    Args:
      buffer: an array [L, B, …] with the slot axis S at position `axis`.
      values: [L, B, T, …]; values whose slot is S or higher are dropped.
      slots: [B, T] int32, the slot of each token.
      axis: the position of the slot axis.
    """
    rows, width = slots.shape
    if width == 1:
        lines = buffer.shape[:axis]
        slot = jnp.broadcast_to(slots.reshape(rows, *(1,) * (axis - 2)), lines)
        return set_lines(buffer, values[:, :, 0], spread_rows(slot, 1, buffer), len(lines))
    moved, taken = jax.vmap(lambda x: by_slot(x, slots, buffer.shape[axis]),
                            out_axes=(0, None))(values)
    taken = jnp.expand_dims(taken, tuple(i for i in range(buffer.ndim) if i not in (1, axis)))
    return jnp.where(taken, jnp.moveaxis(moved, 2, axis), buffer)


def spread_states(states: dict[str, State], like: jax.Array) -> dict[str, State]:
    """Return capture states with their rows sharded over the mesh of `like`, if it is on a mesh."""
    return {
        name: tree.unflatten([spread_rows(x, at, like)
                              for x, at in zip(leaves, state.row_axes, strict=True)])
        for name, state in states.items()
        for leaves, tree in [jax.tree.flatten(state)]
    }
