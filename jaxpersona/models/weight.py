"""Weights of matrix products: plain arrays, and classes for other forms of a weight.

A weight maps activations [..., *in] to [..., *out]. A plain array is a dense weight in the order of
the checkpoint files, [*out, *in]. The classes in this module store such an array (`Dense`), a
weight in another order (`InOut`), a weight with a low-rank update (`LowRank`), or several weights
with the same input (`Joined`); `int8.Int8` stores a quantized weight. `dot` and `dots` accept
arrays and all of these classes, so the forward pass is the same for all of them.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.brief import brief
from jaxpersona.distributed.sharding import (
    Axes,
    gather_weight,
    mesh_of,
    on_cpu,
    out_sharding,
    place,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

F32 = jnp.float32


class Weight(flax.struct.PyTreeNode):
    """The base class of prepared weights: all forms of a weight except the plain array."""

    @abc.abstractmethod
    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply x [..., *in] by the weight; return [..., *out] in `dtype`.

        The product is accumulated in float32. `axes` are the logical axes of the result, required
        if JAX cannot infer the sharding of the result.
        """


class Dense(Weight):
    """A weight [*out, *in] in the order of checkpoint files, possibly sharded.

    Attributes:
      value: the array.
      inner: the number of input dimensions.
    """

    __repr__ = brief

    value: Float[Array, ...]
    inner: int = flax.struct.field(pytree_node=False, default=1)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply x by the weight (see `Weight.dot`)."""
        return _contract(x, self.value, self.inner, axes, dtype)


class InOut(Weight):
    """A weight in [in, out] order, on one device.

    Attributes:
      value: [in, out], with the input and output dimensions flattened.
      out: the sizes of the output dimensions.
      inner: the number of input dimensions.
    """

    __repr__ = brief

    value: Float[Array, "i o"]
    out: tuple[int, ...] = flax.struct.field(pytree_node=False)
    inner: int = flax.struct.field(pytree_node=False, default=1)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply x by the weight (see `Weight.dot`)."""
        rows = x.shape[: x.ndim - self.inner]
        y = jnp.einsum("ri,io->ro", x.reshape(-1, self.value.shape[0]), self.value,
                       preferred_element_type=F32)
        return y.reshape(*rows, *self.out).astype(dtype)


class LowRank(Weight):
    """A weight with a separate low-rank update (LoRA): (W + B·A)·x = W·x + B·(A·x).

    Attributes:
      base: W, an array [*out, *in] or a prepared weight.
      a: the matrix A, [r, *in].
      b: the matrix B, [*out, r], which already includes the scale of the update.
      inner: the number of input dimensions.
    """

    __repr__ = brief

    base: Float[Array, ...] | Weight
    a: Float[Array, "r ..."]
    b: Float[Array, "... r"]
    inner: int = flax.struct.field(pytree_node=False, default=1)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply x by the weight (see `Weight.dot`)."""
        narrow: Axes = ("batch", None, None) if x.ndim - self.inner == 2 else ("batch", None)
        base = dot(x, self.base, inner=self.inner, axes=axes, dtype=F32)
        low = dot(x, self.a, inner=self.inner, axes=narrow)
        return (base + dot(low, self.b, axes=axes, dtype=F32)).astype(dtype)


class Joined(Weight):
    """Several weights with the same input, concatenated along the outputs for a single product.

    Attributes:
      value: a prepared weight with one output dimension, the concatenated outputs.
      outs: for each weight, the sizes of its output dimensions.
    """

    __repr__ = brief

    value: Weight
    outs: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply x by all weights and concatenate the outputs (see `Weight.dot`)."""
        return self.value.dot(x, axes, dtype)

    def split(self, y: jax.Array) -> list[jax.Array]:
        """Split the result of `dot` into one array [..., *out] per weight."""
        sizes = [math.prod(out) for out in self.outs]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [jax.lax.slice_in_dim(y, start, start + size, axis=-1).reshape(*y.shape[:-1], *out)
                for start, size, out in zip(starts, sizes, self.outs, strict=True)]


def dot(x: jax.Array, w: jax.Array | Weight, *, inner: int = 1, axes: Axes | None = None,
        dtype: Any = None) -> jax.Array:
    """Multiply activations by a weight, accumulating in float32.

    Args:
      x: [..., *in].
      w: an array [*out, *in] or a prepared weight.
      inner: the number of input dimensions if `w` is an array; ignored if `w` is a prepared weight.
      axes: the logical axes of the result, required if JAX cannot infer its sharding.
      dtype: the dtype of the result; default: the dtype of x.

    Returns:
      The products, [..., *out].
    """
    weight = w if isinstance(w, Weight) else Dense(w, inner)
    return weight.dot(x, axes, x.dtype if dtype is None else dtype)


def dots(x: jax.Array, weights: Joined | Sequence[jax.Array | Weight]) -> list[jax.Array]:
    """Multiply activations [..., in] by several weights; return one result per weight."""
    if isinstance(weights, Joined):
        return weights.split(weights.dot(x, None, x.dtype))
    return [dot(x, w) for w in weights]


def transposed(w: jax.Array, inner: int = 1) -> InOut:
    """Return the `InOut` form of an array [*out, *in] with `inner` input dimensions."""
    out = w.shape[: w.ndim - inner]
    return InOut(w.reshape(math.prod(out), -1).T, out, inner)


def joined(weights: Sequence[jax.Array], form: Callable[[jax.Array], Weight] = Dense) -> Joined:
    """Return the `Joined` form of arrays [*out, in]; `form` converts the concatenated array."""
    flat = jnp.concatenate([w.reshape(-1, w.shape[-1]) for w in weights])
    return Joined(form(flat), tuple(w.shape[:-1] for w in weights))


def _contract(x: jax.Array, w: jax.Array, inner: int, axes: Axes | None, dtype: Any) -> jax.Array:
    """Contract the last `inner` axes of x and w; return the result in `dtype`.

    Without a mesh, both operands are reshaped to matrices, because XLA's CPU backend would
    transpose a three-dimensional weight in every call.
    """
    if mesh_of(w) is not None:
        return across_devices(x, w, inner, axes, lambda y: y.astype(dtype))
    rows, out = x.shape[: x.ndim - inner], w.shape[: w.ndim - inner]
    width = math.prod(w.shape[w.ndim - inner :])
    y = product(x.reshape(-1, width), w.reshape(-1, width))
    return y.reshape(*rows, *out).astype(dtype)


def across_devices(x: jax.Array, w: jax.Array, inner: int, axes: Axes | None,
                   finish: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Contract the last `inner` axes of x and w on the mesh of w.

    `finish` maps the float32 result to the output: it converts the dtype and, for an int8 weight,
    also applies the scales.
    """
    w = gather_weight(w)
    letters = iter("abcdefghijklmnop")
    rows, out, within = ("".join(next(letters) for _ in range(n))
                         for n in (x.ndim - inner, w.ndim - inner, inner))
    placed = out_sharding(axes, x, w) if axes else None
    w = w if w.dtype == x.dtype else w.astype(x.dtype)
    y = finish(jnp.einsum(f"{rows}{within},{out}{within}->{rows}{out}", x, w,
                          preferred_element_type=F32, out_sharding=placed))
    return y if placed is not None or axes is None else place(y, axes, x, w)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Contract x [R, I] with w [O, I] on one device; return [R, O] in float32."""
    if x.shape[0] == 1 and x.dtype == jnp.bfloat16 and on_cpu(w):
        # XLA's CPU backend has a fast bfloat16 product for two rows, but not for one row
        return jnp.einsum("ri,oi->ro", jnp.concatenate([x, x]), w, preferred_element_type=F32)[:1]
    return jnp.einsum("ri,oi->ro", x, w, preferred_element_type=F32)
