"""Readings of projections onto directions: values per token, moments, and histograms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.brief import brief
from jaxpersona.captures.reading import (
    F32,
    Reading,
    State,
    TokenState,
    numpy_of,
    write_slots,
)
from jaxpersona.errors import UserError
from jaxpersona.models.batch import Batch

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, UInt


class OnDirections(Reading, kw_only=True, repr=False):
    """The base class of readings that project activations onto K directions per layer.

    Attributes:
      directions: [L or 1, K, D] float32, unit length; a first axis of length 1 means the same
        directions at every layer.
      model_origin: [1] uint32, a hash of the weights of the directions' model (`params.origin`), or
        0 if unknown.
    """

    directions: Float[Array, "L K D"]
    model_origin: UInt[Array, " 1"]

    @property
    def origin(self) -> UInt[Array, " 1"]:
        """The origin of the directions, [1] uint32 (see `model_origin`)."""
        return self.model_origin

    def check(self, layers: tuple[int, ...], width: int) -> None:
        """Check the shape of the directions (see `Reading.check`).

        Raises:
          UserError: the directions have the wrong number of layers or the wrong width.
        """
        check_sets("directions", self.directions, layers)
        if self.directions.shape[-1] != width:
            raise UserError(f"directions have width {self.directions.shape[-1]}, but the model's "
                            f"residual stream has width {width}; use directions of this model")

    def project(self, h: jax.Array, index: int) -> jax.Array:
        """Return the projections [B, T, K] of h [B, T, D] onto the directions of one layer."""
        return jnp.einsum("btd,kd->btk", h.astype(F32), self.at(index), precision="highest")

    def read(self, h: jax.Array, weights: jax.Array, index: int) -> Any:
        """Project h [B, T, D] of one layer and reduce the projections (see `Reading.read`)."""
        return self.reduce(self.project(h, index), weights, index)

    def reduce(self, p: jax.Array, weights: jax.Array, index: int) -> Any:
        """Reduce the projections p [B, T, K] of one layer (see `Reading.read`)."""
        raise NotImplementedError

    def at(self, index: int) -> jax.Array:
        """Return the directions [K, D] of one layer (`index` is as in `Reading.read`)."""
        return self.directions[index if self.directions.shape[0] > 1 else 0]

    def details(self) -> list[str]:
        """Return the number of directions, such as ["2 directions"]."""
        count = self.directions.shape[1]
        return [f"{count} direction{'s' * (count != 1)}"]


def check_sets(name: str, values: Any, layers: tuple[int, ...]) -> None:
    """Check that the first axis of an array has one entry per layer, or one entry for all layers.

    Without this check, JAX would silently use the last entry in place of a missing entry.

    Raises:
      UserError: the first axis has another length.
    """
    if values.shape[0] not in (1, len(layers)):
        raise UserError(f"{name} are for {values.shape[0]} layers, but the number of captured "
                        f"layers is {len(layers)}: {list(layers)}; give one entry per captured "
                        "layer")


class Projections(OnDirections, kw_only=True, repr=False):
    """The projections of the selected tokens' activations onto K directions per layer."""

    def init(self, layers: int, rows: int, slots: int, width: int) -> ProjectionState:
        """Return a state with an array [L, B, K, S] of NaN."""
        count = self.directions.shape[1]
        return ProjectionState(jnp.full((layers, rows, count, slots), jnp.nan, F32))

    def reduce(self, p: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Return the projections p [B, T, K], with NaN for tokens that are not selected."""
        return jnp.where(weights[..., None], p, jnp.nan)

    def update(self, state: ProjectionState, reductions: jax.Array, weights: jax.Array,
               batch: Batch, slots: jax.Array) -> ProjectionState:
        """Write the values of one call into the slots of its tokens."""
        return ProjectionState(write_slots(state.values, reductions, slots, axis=3))


class ProjectionState(TokenState):
    """The projections onto K directions, stored as an array [L, B, K, S].

    S is the last axis, because TPUs would pad a small last axis such as K.
    """

    __repr__ = brief

    def result(self) -> Any:
        """Return the projections [B, L, S, K]; entry s belongs to the token in cache slot s."""
        return numpy_of(self.values).transpose(self.values, (1, 0, 3, 2))


class ProjectionMoments(OnDirections, kw_only=True, repr=False):
    """The count, mean and variance of the projections of each row's selected tokens."""

    label: ClassVar[str] = "moments"
    needs_token: ClassVar[bool] = True

    def init(self, layers: int, rows: int, slots: int, width: int) -> MomentState:
        """Return the initial state, before any token is read."""
        zero = jnp.zeros((layers, rows, self.directions.shape[1]), F32)
        return MomentState(jnp.zeros((rows,), F32), zero, zero)

    def reduce(self, p: jax.Array, weights: jax.Array,
               index: int) -> tuple[jax.Array, jax.Array]:
        """Return the mean and sum of squared deviations of selected projections, each [B, K]."""
        w = weights[..., None].astype(F32)
        count = jnp.maximum(w.sum(1), 1.0)
        mean = (p * w).sum(1) / count
        return mean, (w * (p - mean[:, None]) ** 2).sum(1)

    def update(self, state: MomentState, reductions: tuple[jax.Array, jax.Array],
               weights: jax.Array, batch: Batch, slots: jax.Array) -> MomentState:
        """Merge the moments of one call into the state (Chan et al. 1983)."""
        mean, squares = reductions
        added = weights.sum(-1, dtype=F32)
        count = state.count + added
        share = (added / jnp.maximum(count, 1.0))[None, :, None]
        shift = mean - state.mean
        squares = state.squares + squares + shift**2 * state.count[None, :, None] * share
        return MomentState(count, state.mean + shift * share, squares)


class Moments(flax.struct.PyTreeNode):
    """The count, mean and variance of the projections of each row's selected tokens.

    Attributes:
      count: [B] float32, the number of selected tokens.
      mean: [B, L, K] float32; NaN for rows without a selected token.
      variance: [B, L, K] float32, the population variance; NaN for rows without a selected token.
    """

    __repr__ = brief

    count: Float[Array, " B"]
    mean: Float[Array, "B L K"]
    variance: Float[Array, "B L K"]


class MomentState(State):
    """The running moments of projections (Welford 1962), merged across calls (Chan et al. 1983).

    Attributes:
      count: [B] float32, the number of selected tokens so far.
      mean: [L, B, K] float32, the mean projection.
      squares: [L, B, K] float32, the sum of squared deviations from the mean.
    """

    __repr__ = brief

    row_axes: ClassVar[tuple[int, ...]] = (0, 1, 1)
    label: ClassVar[str] = "moments"

    count: Float[Array, " B"]
    mean: Float[Array, "L B K"]
    squares: Float[Array, "L B K"]

    def result(self) -> Moments:
        """Return the moments of every row, with NaN for rows without a selected token."""
        count, xp = self.count[None, :, None], numpy_of(self.mean)
        seen = count > 0
        mean = xp.where(seen, self.mean, xp.nan)
        variance = xp.where(seen, self.squares / xp.maximum(count, 1.0), xp.nan)
        return Moments(self.count, xp.moveaxis(mean, 0, 1), xp.moveaxis(variance, 0, 1))

    @property
    def empty(self) -> Bool[Array, " B"]:
        """[B] bool: True for rows in which no token was selected."""
        return self.count == 0


class Histogram(OnDirections, kw_only=True, repr=False):
    """A histogram of the projections of each row's selected tokens, with fixed bin edges.

    Attributes:
      edges: [L or 1, K or 1, E] float32, ascending. The first and the last of the E + 1 bins are
        unbounded.
    """

    edges: Float[Array, "L K E"]

    def init(self, layers: int, rows: int, slots: int, width: int) -> CountState:
        """Return a state with an array [L, B, K, E + 1] of zeros."""
        shape = (layers, rows, self.directions.shape[1], self.edges.shape[-1] + 1)
        return CountState(jnp.zeros(shape, jnp.int32))

    def reduce(self, p: jax.Array, weights: jax.Array, index: int) -> jax.Array:
        """Return the number of selected projections in each bin, [B, K, E + 1] int32."""
        edges = self.edges[index if self.edges.shape[0] > 1 else 0]
        number = (p[..., None] >= edges[None, None]).sum(-1, dtype=jnp.int32)
        bins = jnp.arange(edges.shape[-1] + 1, dtype=jnp.int32)
        in_bin = (number[..., None] == bins[None, None, None]) & weights[..., None, None]
        return in_bin.sum(1, dtype=jnp.int32)

    def update(self, state: CountState, reductions: jax.Array, weights: jax.Array, batch: Batch,
               slots: jax.Array) -> CountState:
        """Add the counts of one call to the state."""
        return CountState(state.counts + reductions)

    def check(self, layers: tuple[int, ...], width: int) -> None:
        """Check the shapes of the directions and edges (see `Reading.check`).

        Raises:
          UserError: as for `OnDirections.check`, or the edges have the wrong number of layers.
        """
        super().check(layers, width)
        check_sets("edges", self.edges, layers)

    def details(self) -> list[str]:
        """Return the numbers of directions and bins, such as ["2 directions", "10 bins"]."""
        return [*super().details(), f"{self.edges.shape[-1] + 1} bins"]


class CountState(State):
    """The counts of a histogram.

    Attributes:
      counts: [L, B, K, E + 1] int32, the number of tokens in each bin.
    """

    __repr__ = brief

    row_axes: ClassVar[tuple[int, ...]] = (1,)

    counts: Int[Array, "L B K bins"]

    def result(self) -> Any:
        """Return the counts [B, L, K, E + 1] int32."""
        return numpy_of(self.counts).moveaxis(self.counts, 0, 1)
