"""Weights in int8, with a scale per output channel or per block of inputs.

The quantization is symmetric around zero: w ≈ value · scale. The scale of a channel multiplies the
result of the matrix product, not the weight, so programs compiled for accelerators convert int8
values inside the product and write no dequantized copy. XLA's CPU backend would write such a copy,
and block scales must multiply the weight itself. On a CPU without a mesh, and for block scales on
any device, a product is therefore computed for a few output channels at a time, which limits the
size of the converted weights.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import brief
from jaxpersona.distributed.sharding import (
    Axes,
    gather_weight,
    mesh_of,
    on_cpu,
    out_sharding,
    platform,
)
from jaxpersona.models.weight import F32, Weight, across_devices, product

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt32
    from jaxtyping import Int8 as Integers

    from jaxpersona.models.params import Params

LEVELS = 127  # int8 values are −127…127, symmetric around zero
# number of bytes of float32 weights that are converted at a time; they fit in a CPU core's cache
_PIECE = 1 << 20


class Int8(Weight):
    """A weight quantized to int8, symmetric around zero: w ≈ value · scale.

    Attributes:
      value: [*out, *in] int8, in −127…127.
      scale: [*out] float32, one scale per output channel; or [*out, n] float16, one scale per block
        of the flattened inputs, as in GGUF's Q8_0. Blocks are supported only without a mesh.
      made_from: [3, 2] uint32, the two sums that `params.fingerprint` computes for each of three
        arrays: the weight before quantization, `value` and `scale`. None if the sums of the weight
        before quantization are unknown.
      inner: the number of input dimensions.
    """

    __repr__ = brief

    value: Integers[Array, ...]
    scale: Float[Array, ...]
    made_from: UInt32[Array, "3 2"] | None = None
    inner: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, [*out, *in]."""
        return self.value.shape

    @property
    def blocked(self) -> bool:
        """Whether there is one scale per block of inputs instead of one per output channel."""
        return self.scale.ndim > self.value.ndim - self.inner

    def dot(self, x: jax.Array, axes: Axes | None, dtype: Any) -> jax.Array:
        """Multiply x by the weight (see `Weight.dot`)."""
        if mesh_of(self.value) is not None:
            scale = gather_weight(self.scale)

            def scaled(y: jax.Array) -> jax.Array:
                return (y * jax.lax.expand_dims(scale, range(y.ndim - scale.ndim))).astype(dtype)

            # the backward pass converts the int8 weight again instead of saving a converted copy
            @functools.partial(jax.checkpoint, prevent_cse=True)
            def multiply(x: jax.Array, value: jax.Array) -> jax.Array:
                return across_devices(x, value, self.inner, axes, scaled)

            return multiply(x, self.value)
        rows, out = x.shape[: x.ndim - self.inner], self.shape[: self.value.ndim - self.inner]
        value = self.value.reshape(math.prod(out), -1)
        scale = self.scale.reshape(value.shape[0], -1)
        y = _product(x.reshape(-1, value.shape[1]), value, scale)
        return y.reshape(*rows, *out).astype(dtype)

    def take(self, index: jax.Array | np.ndarray, dtype: Any) -> jax.Array:
        """Look up token ids [B, T] in this embedding [V, D]; return [B, T, D] in `dtype`.

        Out-of-range ids are clipped.
        """
        value, scale = gather_weight(self.value), self.scale
        if on_cpu(value):
            # without the barrier, XLA would convert the whole embedding to float32 before a loop
            value, index = jax.lax.optimization_barrier((value, index))

        def rows(table: jax.Array) -> jax.Array:
            placed = out_sharding(("batch",) + (None,) * table.ndim, table)
            found = table.at[index].get(mode="clip", wrap_negative_indices=False,
                                        out_sharding=placed)
            return found.astype(F32)

        taken, scales = rows(value), rows(scale)
        if not self.blocked:
            return (taken * scales[..., None]).astype(dtype)
        blocks = taken.reshape(*scales.shape, -1) * scales[..., None]
        return blocks.reshape(taken.shape).astype(dtype)


def quantized(w: jax.Array, inner: int = 1) -> Int8:
    """Quantize an array [*out, *in], with scale = max|w| / 127 for each output channel.

    `inner` is the number of input dimensions. The quantization error of each value is at most half
    the scale of its channel.
    """
    axes = tuple(range(w.ndim - inner, w.ndim))
    wide = w.astype(F32)
    scale = jnp.abs(wide).max(axes) / LEVELS
    safe = jnp.where(scale > 0, scale, 1.0)  # avoid 0 / 0 in a channel of zeros
    value = jnp.round(wide / jnp.expand_dims(safe, axes))
    return Int8(value.astype(jnp.int8), scale, inner=inner)


def dequantized(w: Int8, dtype: Any = F32) -> jax.Array:
    """Return the dense array [*out, *in] that an int8 weight represents."""
    if not w.blocked:
        scale = jnp.expand_dims(w.scale, tuple(range(w.value.ndim - w.inner, w.value.ndim)))
        return (w.value.astype(F32) * scale).astype(dtype)
    blocks = w.value.reshape(*w.scale.shape, -1).astype(F32) * w.scale.astype(F32)[..., None]
    return blocks.reshape(w.shape).astype(dtype)


def scheme(params: Params) -> str:
    """Describe the quantization, such as "int8 per channel"; return "" for unquantized weights."""
    def is_int8(x: Any) -> bool:
        return isinstance(x, Int8)

    held = [x for x in jax.tree.leaves(params.layers, is_leaf=is_int8) if is_int8(x)]
    if not held:
        return ""
    kinds = sorted({"in blocks" if x.blocked else "per channel" for x in held}, reverse=True)
    tables = "" if is_int8(params.embed_vd) else ", float tables"
    return f"int8 {' and '.join(kinds)}{tables}"


def weights_note(params: Params) -> dict[str, str]:
    """Return the metadata {"weights": scheme(params)}, or {} if no weight is quantized."""
    found = scheme(params)
    return {"weights": found} if found else {}


# the backward pass converts the int8 weight again instead of saving a converted copy
@functools.partial(jax.checkpoint, prevent_cse=True)
def _product(x: jax.Array, value: jax.Array, scale: jax.Array) -> jax.Array:
    """Contract x [R, I] with the int8 weight value · scale; return [R, O] in float32.

    The value is [O, I], and the scale is [O, n], with n blocks per channel. For one row on a GPU,
    an elementwise product and a sum are faster than XLA's matrix product, which does not saturate
    memory bandwidth (34.8 µs instead of 46.4 µs for a [12288, 4096] weight on an H100).
    """
    if scale.shape[1] > 1 or platform(value) == "cpu":
        return _in_pieces(x, value, scale)
    if x.shape[0] == 1 and platform(value) == "gpu":
        y = jnp.sum(x.astype(F32) * value.astype(F32), -1)[None]
    else:
        y = product(x, value.astype(x.dtype))
    return y * scale[:, 0][None]


def _in_pieces(x: jax.Array, value: jax.Array, scale: jax.Array) -> jax.Array:
    """Compute `_product` for a few output channels at a time.

    Slicing limits the size of the converted weights. If the number of channels is not a multiple of
    the slice size, the last two slices overlap.
    """
    channels, width = value.shape
    size = min(max(_PIECE // (4 * width), 8), channels)
    count = -(-channels // size)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # prevent_cse is not needed in a loop
    def piece(start: jax.Array, x: jax.Array, value: jax.Array, scale: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(value, start, size)
        own = jax.lax.dynamic_slice_in_dim(scale, start, size)
        if scale.shape[1] > 1:
            wide = part.reshape(size, scale.shape[1], -1).astype(F32) * own.astype(F32)[..., None]
            return product(x, wide.reshape(size, width).astype(x.dtype))
        return product(x, part.astype(x.dtype)) * own[:, 0][None]

    if count == 1:
        # without the barrier, XLA would convert the weight before a decode loop and keep the copy
        x, value, scale = jax.lax.optimization_barrier((x, value, scale))
        return piece(jnp.int32(0), x, value, scale)
    starts = jnp.minimum(jnp.arange(count, dtype=jnp.int32) * size, channels - size)
    y = jax.lax.map(lambda start: piece(start, x, value, scale), starts)  # [count, R, size]
    whole = jnp.moveaxis(y[:-1], 0, 1).reshape(x.shape[0], (count - 1) * size)
    last = y[-1, :, count * size - channels :]
    return jnp.concatenate([whole, last], -1)
