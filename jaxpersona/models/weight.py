"""Weights of matrix products: dense arrays, and copies prepared for a device.

A weight maps activations [..., *in] to [..., *out]. A plain array is a dense weight in the order of
the checkpoint files, [*out, *in]. The classes here store the same numbers in another order
(`InOut`), quantized (`Int8`), or several weights of the same input in one array (`Joined`). `dot`
and `dots` accept all of them, so the forward pass does not depend on the kind.
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
    platform,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float
    from jaxtyping import Int8 as Integers

F32 = jnp.float32
_LEVELS = 127  # int8 values are -127…127, symmetric around zero


class Weight(flax.struct.PyTreeNode):
    """The base class of prepared weights."""

    @abc.abstractmethod
    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply x [..., *in] with the weight in float32 accumulation: [..., *out] of `dtype`.

        `axes` are the logical axes of the result, needed where JAX cannot infer its sharding.
        """


class Dense(Weight):
    """An array [*out, *in] in checkpoint order, possibly sharded; `inner` is the rank of *in*."""

    __repr__ = brief

    value: Float[Array, ...]
    inner: int = flax.struct.field(pytree_node=False, default=1)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply (see `Weight.dot`)."""
        return _contract(x, self.value, self.inner, axes, lambda y: y.astype(dtype))


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


class Int8(Weight):
    """An int8 weight with one scale per output channel, symmetric: w ≈ value · scale.

    The scale multiplies the product, not the weight, so that no dequantized copy is written.

    Attributes:
      value: [*out, *in] int8, in −127…127.
      scale: [*out] float32.
      inner: the rank of *in*.
    """

    __repr__ = brief

    value: Integers[Array, ...]
    scale: Float[Array, ...]
    inner: int = flax.struct.field(pytree_node=False, default=1)

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply (see `Weight.dot`)."""
        def scaled(y: jax.Array) -> jax.Array:
            scale = jax.lax.expand_dims(self.scale, range(y.ndim - self.scale.ndim))
            return (y * scale).astype(dtype)

        return _contract(x, self.value, self.inner, axes, scaled)


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
    """Multiply activations with a weight, in float32 accumulation.

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


def quantized(w: jax.Array, inner: int = 1) -> Int8:
    """Return the `Int8` form of an array [*out, *in]: scale = max|w| / 127 per output channel."""
    axes = tuple(range(w.ndim - inner, w.ndim))
    wide = w.astype(F32)
    scale = jnp.abs(wide).max(axes) / _LEVELS
    safe = jnp.where(scale > 0, scale, 1.0)  # a channel of zeros
    value = jnp.round(wide / jnp.expand_dims(safe, axes))
    return Int8(value.astype(jnp.int8), scale, inner)


def joined(weights: Sequence[jax.Array], form: Callable[[jax.Array], Weight] = Dense) -> Joined:
    """Return the `Joined` form of arrays [*out, in], with the array in the given form."""
    flat = jnp.concatenate([w.reshape(-1, w.shape[-1]) for w in weights])
    return Joined(form(flat), tuple(w.shape[:-1] for w in weights))


def _contract(x: jax.Array, w: jax.Array, inner: int, axes: Axes | None,
              finish: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Contract the last `inner` axes of x and w; `finish` maps the float32 result to the output.

    On a mesh the result is converted before it is summed over devices, which halves the bytes.
    """
    if mesh_of(w) is None:
        return finish(_on_one_device(x, w, inner))
    w = gather_weight(w)
    letters = iter("abcdefghijklmnop")
    rows, out, within = ("".join(next(letters) for _ in range(n))
                         for n in (x.ndim - inner, w.ndim - inner, inner))
    placed = out_sharding(axes, x, w) if axes else None
    w = w if w.dtype == x.dtype else w.astype(x.dtype)
    y = finish(jnp.einsum(f"{rows}{within},{out}{within}->{rows}{out}", x, w,
                          preferred_element_type=F32, out_sharding=placed))
    return y if placed is not None or axes is None else place(y, axes, x, w)


def _on_one_device(x: jax.Array, w: jax.Array, inner: int) -> jax.Array:
    """Contract as a two-dimensional product.

    XLA's CPU backend would transpose a three-dimensional weight at every step.
    """
    rows, out = x.shape[: x.ndim - inner], w.shape[: w.ndim - inner]
    width = math.prod(w.shape[w.ndim - inner :])
    x, w = x.reshape(-1, width), w.reshape(-1, width)
    if w.dtype == jnp.int8:
        y = _int8_product(x, w)
    elif x.shape[0] == 1 and x.dtype == jnp.bfloat16 and on_cpu(w):
        # XLA's CPU backend has a fast bfloat16 product for two rows, but not for one
        y = jnp.einsum("ri,oi->ro", jnp.concatenate([x, x]), w, preferred_element_type=F32)[:1]
    else:
        y = jnp.einsum("ri,oi->ro", x, w, preferred_element_type=F32)
    return y.reshape(*rows, *out)


def _int8_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Contract x [R, I] with w [O, I] int8 in float32 accumulation: [R, O].

    On a GPU one row is faster as a multiplication and a sum (34.8 µs against 46.4 µs for a
    [12288, 4096] weight on an H100): XLA's product does not reach the memory's bandwidth.
    """
    if x.shape[0] == 1 and platform(w) == "gpu":
        return jnp.sum(x.astype(F32) * w.astype(F32), -1)[None]
    return jnp.einsum("ri,oi->ro", x, w.astype(x.dtype), preferred_element_type=F32)
