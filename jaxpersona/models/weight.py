"""Weights of matrix products: dense arrays, and copies prepared for a device.

A weight maps activations [..., *in] to [..., *out]. A plain array is a dense weight in the order of
the checkpoint files, [*out, *in]. The classes here store the same numbers in another order
(`InOut`), with a low-rank update (`LowRank`), or several weights of the same input in one array
(`Joined`); `int8.Int8` stores them quantized. `dot` and `dots` accept all of them, so the forward
pass does not depend on the kind.
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
    """The base class of prepared weights."""

    @abc.abstractmethod
    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply x [..., *in] with the weight accumulating in float32: [..., *out] of `dtype`.

        `axes` are the logical axes of the result, needed where JAX cannot infer its sharding.
        """


class Dense(Weight):
    """An array [*out, *in] in checkpoint order, possibly sharded; `inner` is the rank of *in*."""

    __repr__ = brief

    value: Float[Array, ...]
    inner: int = flax.struct.field(pytree_node=False, default=1)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply (see `Weight.dot`)."""
        return _contract(x, self.value, self.inner, axes, dtype)


class InOut(Weight):
    """A weight in [in, out] order, on one device.

    Attributes:
      value: [in, out], with the input and output dimensions flattened.
      out: the output dimensions.
      inner: the number of input dimensions.
    """

    __repr__ = brief

    value: Float[Array, "i o"]
    out: tuple[int, ...] = flax.struct.field(pytree_node=False)
    inner: int = flax.struct.field(pytree_node=False, default=1)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply (see `Weight.dot`)."""
        rows = x.shape[: x.ndim - self.inner]
        y = jnp.einsum("ri,io->ro", x.reshape(-1, self.value.shape[0]), self.value,
                       preferred_element_type=F32)
        return y.reshape(*rows, *self.out).astype(dtype)


class LowRank(Weight):
    """A weight plus a low-rank update that is kept apart (LoRA): (W + B·A)·x = W·x + B·(A·x).

    Attributes:
      base: W, an array [*out, *in] or a prepared weight.
      a: A [r, *in].
      b: B [*out, r], with the scale of the update multiplied in.
      inner: the rank of *in*.
    """

    __repr__ = brief

    base: Float[Array, ...] | Weight
    a: Float[Array, "r ..."]
    b: Float[Array, "... r"]
    inner: int = flax.struct.field(pytree_node=False, default=1)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply (see `Weight.dot`)."""
        narrow: Axes = ("batch", None, None) if x.ndim - self.inner == 2 else ("batch", None)
        base = dot(x, self.base, inner=self.inner, axes=axes, dtype=F32)
        low = dot(x, self.a, inner=self.inner, axes=narrow)
        return (base + dot(low, self.b, axes=axes, dtype=F32)).astype(dtype)


class Joined(Weight):
    """Several weights of the same input as one product, concatenated along their outputs.

    Attributes:
      value: a prepared weight with one output dimension, the sum of the sizes of `outs`.
      outs: the output dimensions of each weight.
    """

    __repr__ = brief

    value: Weight
    outs: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply; the result's last axis concatenates the outputs (see `Weight.dot`)."""
        return self.value.dot(x, axes, dtype)

    def split(self, y: jax.Array) -> list[jax.Array]:
        """Split the result [..., sum of outputs] of `dot` into one array [..., *out] per weight."""
        sizes = [math.prod(out) for out in self.outs]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [jax.lax.slice_in_dim(y, start, start + size, axis=-1).reshape(*y.shape[:-1], *out)
                for start, size, out in zip(starts, sizes, self.outs, strict=True)]


def dot(x: jax.Array, w: jax.Array | Weight, *, inner: int = 1, axes: Axes | None = None,
        dtype: Any = None) -> jax.Array:
    """Multiply activations with a weight, accumulating in float32.

    Args:
      x: [..., *in].
      w: an array [*out, *in] or a prepared weight.
      inner: the rank of *in*; a prepared weight has its own.
      axes: logical axes of the result, needed where JAX cannot infer its sharding.
      dtype: of the result; default: x's.

    Returns:
      [..., *out].
    """
    weight = w if isinstance(w, Weight) else Dense(w, inner)
    return weight.dot(x, axes, x.dtype if dtype is None else dtype)


def dots(x: jax.Array, weights: Joined | Sequence[jax.Array | Weight]) -> list[jax.Array]:
    """Multiply activations [..., in] with several weights, or with their `Joined` form."""
    if isinstance(weights, Joined):
        return weights.split(weights.dot(x, None, x.dtype))
    return [dot(x, w) for w in weights]


def transposed(w: jax.Array, inner: int = 1) -> InOut:
    """Return the `InOut` form of an array [*out, *in]."""
    out = w.shape[: w.ndim - inner]
    return InOut(w.reshape(math.prod(out), -1).T, out, inner)


def joined(weights: Sequence[jax.Array], form: Callable[[jax.Array], Weight] = Dense) -> Joined:
    """Return the `Joined` form of arrays [*out, in], with the array in the given form."""
    flat = jnp.concatenate([w.reshape(-1, w.shape[-1]) for w in weights])
    return Joined(form(flat), tuple(w.shape[:-1] for w in weights))


def _contract(x: jax.Array, w: jax.Array, inner: int, axes: Axes | None, dtype: Any) -> jax.Array:
    """Contract the last `inner` axes of x and w into `dtype`.

    Without a mesh the product is two-dimensional: XLA's CPU backend would transpose a
    three-dimensional weight at every step.
    """
    if mesh_of(w) is not None:
        return across_devices(x, w, inner, axes, lambda y: y.astype(dtype))
    rows, out = x.shape[: x.ndim - inner], w.shape[: w.ndim - inner]
    width = math.prod(w.shape[w.ndim - inner :])
    y = product(x.reshape(-1, width), w.reshape(-1, width))
    return y.reshape(*rows, *out).astype(dtype)


def across_devices(x: jax.Array, w: jax.Array, inner: int, axes: Axes | None,
                   finish: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Contract the last `inner` axes of x and w on w's mesh.

    `finish` maps the float32 result to the output. The result is converted before it is summed over
    devices, which halves the bytes.
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
    """Contract x [R, I] with w [O, I] on one device accumulating in float32: [R, O]."""
    if x.shape[0] == 1 and x.dtype == jnp.bfloat16 and on_cpu(w):
        # XLA's CPU backend has a fast bfloat16 product for two rows, but not for one
        return jnp.einsum("ri,oi->ro", jnp.concatenate([x, x]), w, preferred_element_type=F32)[:1]
    return jnp.einsum("ri,oi->ro", x, w, preferred_element_type=F32)
