"""Model parameters: layout, initialization and fingerprints.

`layout` describes the shape, logical axes and initializer of every array, for initialization,
loading, saving and sharding (`ckpts.names` defines the names in checkpoints). Weights keep the
`[out, in]` order of the checkpoint files but split the head axes, so loading only reshapes them:
`wq_nhd` [N, H, D] is the reshaped weight of q_proj [N·H, D].
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpersona.brief import brief
from jaxpersona.calls import checked_call
from jaxpersona.distributed import processes
from jaxpersona.distributed.sharding import Axes, unset_mesh
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.int8 import Int8
from jaxpersona.models.weight import Joined


class Layer(flax.struct.PyTreeNode):
    """The parameters of one block. Fields that the model family does not use are None.

    Each weight is an array or a prepared `weight.Weight`. If `joined_qkv` or `joined_gate_up` is
    set, it replaces the separate weights, and their fields are None.
    """

    __repr__ = brief

    attn_norm_d: Any
    wq_nhd: Any
    wk_khd: Any
    wv_khd: Any
    wo_dnh: Any
    mlp_norm_d: Any
    w_gate_fd: Any
    w_up_fd: Any
    w_down_df: Any
    bq_nh: Any = None
    bk_kh: Any = None
    bv_kh: Any = None
    bo_d: Any = None
    q_norm_h: Any = None
    k_norm_h: Any = None
    b_gate_f: Any = None
    b_up_f: Any = None
    b_down_d: Any = None
    attn_post_norm_d: Any = None
    mlp_post_norm_d: Any = None
    joined_qkv: Joined | None = None
    joined_gate_up: Joined | None = None

    @property
    def qkv(self) -> Joined | tuple[Any, Any, Any]:
        """The weights of the query, key and value projections, joined or as a tuple."""
        return self.joined_qkv or (self.wq_nhd, self.wk_khd, self.wv_khd)

    @property
    def gate_up(self) -> Joined | tuple[Any, Any]:
        """The weights of the MLP's gate and up projections, joined or as a tuple."""
        return self.joined_gate_up or (self.w_gate_fd, self.w_up_fd)


class Params(flax.struct.PyTreeNode):
    """The parameters of a model: embedding, blocks, final norm, and the head if it is untied.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.load("mini").params.embed_vd.shape
      (1024, 128)
    """

    __repr__ = brief

    embed_vd: Any
    layers: tuple[Layer, ...]
    final_norm_d: Any
    head_vd: Any = None

    @property
    def like(self) -> jax.Array:
        """An array with the dtype of the activations and the devices of the parameters."""
        return self.final_norm_d if isinstance(self.embed_vd, Int8) else self.embed_vd


@dataclasses.dataclass(frozen=True)
class Spec:
    """The shape, logical axes, initializer and dtype of one parameter array.

    Attributes:
      shape, axes: the dimensions and their logical axes.
      inner: the number of trailing input dimensions of a weight; 0 for norms and biases.
      init: the standard deviation of the normal initializer, or None for a norm weight, which is
        initialized to the identity.
      dtype: the dtype of the array, or None for the dtype of the activations.
    """

    shape: tuple[int, ...]
    axes: Axes
    inner: int = 0
    init: float | None = 0.02
    dtype: str | None = None


def _layer_layout(config: ModelConfig) -> Layer:
    d, f = config.d_model, config.d_ff
    n, k, h = config.n_heads, config.n_kv_heads, config.head_dim
    qkv, qk, post, mlp = config.qkv_bias, config.qk_norm, config.post_norms, config.mlp_bias

    def norm(width: int) -> Spec:
        return Spec((width,), (None,), init=None)

    return Layer(
        attn_norm_d=norm(d),
        wq_nhd=Spec((n, h, d), ("heads", None, "embed"), 1),
        wk_khd=Spec((k, h, d), ("kv_heads", None, "embed"), 1),
        wv_khd=Spec((k, h, d), ("kv_heads", None, "embed"), 1),
        wo_dnh=Spec((d, n, h), ("embed", "heads", None), 2),
        mlp_norm_d=norm(d),
        w_gate_fd=Spec((f, d), ("ff", "embed"), 1),
        w_up_fd=Spec((f, d), ("ff", "embed"), 1),
        w_down_df=Spec((d, f), ("embed", "ff"), 1),
        bq_nh=Spec((n, h), ("heads", None)) if qkv else None,
        bk_kh=Spec((k, h), ("kv_heads", None)) if qkv else None,
        bv_kh=Spec((k, h), ("kv_heads", None)) if qkv else None,
        bo_d=Spec((d,), ("embed",)) if config.o_bias else None,
        q_norm_h=norm(h) if qk else None,
        k_norm_h=norm(h) if qk else None,
        b_gate_f=Spec((f,), ("ff",)) if mlp else None,
        b_up_f=Spec((f,), ("ff",)) if mlp else None,
        b_down_d=Spec((d,), ("embed",)) if mlp else None,
        attn_post_norm_d=norm(d) if post else None,
        mlp_post_norm_d=norm(d) if post else None,
    )


def layout(config: ModelConfig) -> Params:
    """Return a `Params` with the `Spec` of every parameter."""
    v, d = config.vocab_size, config.d_model
    table = Spec((v, d), ("vocab", "embed"), 1)
    return Params(
        embed_vd=table,
        layers=(_layer_layout(config),) * config.n_layers,
        final_norm_d=Spec((d,), (None,), init=None),
        head_vd=None if config.tied_embeddings else table,
    )


@checked_call
def init_params(config: ModelConfig, key: jax.Array, dtype: Any = "float32") -> Params:
    """Initialize parameters: N(0, 0.02²) for weights and biases, and the identity for norms.

    Values are drawn in float32 and then rounded to `dtype`; the draws do not depend on `dtype`.

    Examples:
      >>> import jaxpersona as jp
      >>> import jax
      >>> config = jp.load("mini").config
      >>> jax.eval_shape(lambda key: jp.init_params(config, key), jax.random.key(0)).embed_vd.shape
      (1024, 128)
    """
    specs, tree = jax.tree.flatten(layout(config))
    identity = 1.0 - config.norm_offset

    def draw(index: int, spec: Spec) -> jax.Array:
        if spec.init is None:
            return jnp.full(spec.shape, identity, dtype)
        sample = jax.random.normal(jax.random.fold_in(key, index), spec.shape, jnp.float32)
        return (sample * spec.init).astype(dtype)

    return jax.tree.unflatten(tree, [draw(i, spec) for i, spec in enumerate(specs)])


class Derived:
    """A thread-safe cache of the last value that was computed from a pytree of arrays.

    The value is reused only if the function, the tree structure and every array (by identity) are
    the same. Values computed from NumPy arrays are not cached, because NumPy arrays are mutable.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: tuple[Callable[[Any], Any], Any, list[Any], Any] | None = None

    def get(self, tree: Any, make: Callable[[Any], Any]) -> Any:
        """Return `make(tree)`, or the cached value if `make` and `tree` are unchanged."""
        leaves, structure = jax.tree.flatten(tree)
        if not all(isinstance(x, jax.Array) for x in leaves):
            return make(tree)
        with self._lock:
            held = self._held
            if held is None or held[0] is not make or held[1] != structure or (
                    not same_arrays(held[2], leaves)):
                self._held = held = None  # free the old value before computing the new one
                self._held = held = make, structure, leaves, make(tree)
            return held[3]


def same_arrays(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Return whether two lists contain the same array objects in the same order."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def abstract_params(config: ModelConfig, dtype: Any = jnp.bfloat16) -> Params:
    """Return the parameters as `jax.ShapeDtypeStruct`s, for ahead-of-time compilation."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), layout(config))


SCHEME = 2  # version of the fingerprint algorithm; version 1 covered only 64 values of each array


def fingerprint(config: ModelConfig, params: Params) -> str:
    """Return sixteen hexadecimal digits that identify a model's configuration and weights.

    The first eight digits are `config.hash()`. The others are a hash of two sums per array, modulo
    2³². For these sums, each value is rounded to bfloat16, and its bits are mixed and multiplied by
    an odd factor that depends on its position. Odd factors are invertible modulo 2³², so a change
    of a single value changes both sums. Factors differ by position, so swapping two values almost
    always changes both sums too. Integer sums do not depend on the order of addition, so the
    fingerprint is the same on every mesh. Rounding makes it the same in float32 and bfloat16. For
    an int8 weight, the hash uses the sums of the weight before quantization (`Int8.made_from`) or,
    if they are unknown or the weight has changed since, the sums of `value` and `scale`.

    A checkpoint loaded in float16 has the same fingerprint only if rounding to float16 does not
    change the bfloat16 rounding of any value; for example, no value may overflow.

    In a run with several processes, all processes must call this function.
    """
    return begin_fingerprint(config, params)()


def begin_fingerprint(config: ModelConfig, params: Params) -> Callable[[], str]:
    """Start computing a fingerprint; return a function that waits for the result and returns it.

    The devices compute the sums while the host continues.
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8))
    counted: list[Any] = []
    for x in leaves:
        counted += [x.value, x.scale] if isinstance(x, Int8) else [x]
    made_from = [x.made_from for x in leaves if isinstance(x, Int8)]
    sent = dispatch_sums(counted)

    def finish() -> str:
        own, sums = iter(collect_sums(sent)), []
        known: Any = iter(jax.device_get(made_from))
        for x in leaves:
            if not isinstance(x, Int8):
                sums.append(next(own))
                continue
            parts, before = np.stack([next(own), next(own)]), next(known)
            if before is not None and np.array_equal(before[1:], parts):
                parts = before[:1]  # the weight has not changed since it was quantized
            sums += list(parts)
        return config.hash() + hashlib.sha256(np.stack(sums).tobytes()).hexdigest()[:8]

    return finish


def dispatch_sums(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Start computing each array's fingerprint sums; return the arrays for `collect_sums`."""
    with unset_mesh():
        return [_sums(x, *_weights(x), placed=_spread(x)) for x in arrays]


def collect_sums(parts: Sequence[jax.Array]) -> np.ndarray:
    """Return the sums of n arrays, [n, 2] uint32; all processes must call this function."""
    if not parts:
        return np.zeros((0, 2), np.uint32)
    local = jax.device_get([[shard.data for shard in x.addressable_shards] for x in parts])
    sums = np.stack([np.concatenate(of_one).sum(0, dtype=np.uint32) for of_one in local])
    if not all(part.is_fully_addressable for part in parts):
        sums = processes.total(sums)
    return sums


def origin(mark: str) -> int:
    """Return the last eight hexadecimal digits of a fingerprint as an integer, or 0 for ""."""
    return int(mark[8:], 16) if mark else 0


def _spread(x: jax.Array) -> NamedSharding | None:
    """Return an array's sharding with one spec entry per dimension, or None on a single device."""
    placed = x.sharding
    if not isinstance(placed, NamedSharding) or placed.mesh.size == 1:
        return None
    entries = (*placed.spec, *[None] * (x.ndim - len(placed.spec)))
    return NamedSharding(placed.mesh, PartitionSpec(*entries))


def _weights(x: jax.Array) -> list[Any]:
    """Return the odd factors for x's two sums: two arrays of row factors, two of column factors.

    Row factors have the shape of x without the last dimension. Column factors are [C], where C is
    the size of the last dimension. In each sum, a value is multiplied by its row and column factor.
    """
    placed = _spread(x)
    rows, column = x.shape[:-1], x.shape[-1:]
    made = []
    for seed, shape in enumerate((rows, rows, column, column)):
        numbers = _odd(math.prod(shape), seed).reshape(shape)
        if placed is not None:  # `shard_map` requires factors that are sharded like x
            spec = placed.spec[:-1] if seed < 2 else placed.spec[-1:]
            where = NamedSharding(placed.mesh, PartitionSpec(*spec))
            numbers = jax.make_array_from_callback(shape, where, numbers.__getitem__)
        made.append(numbers)
    return made


@functools.lru_cache(maxsize=32)
def _odd(count: int, seed: int) -> np.ndarray:
    """Return `count` odd uint32 numbers, hashed from their indices (MurmurHash3 finalizer)."""
    x = np.arange(count, dtype=np.uint32) + np.uint32(0x9E3779B1 * (seed + 1) % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x |= np.uint32(1)
    x.flags.writeable = False
    return x


@functools.partial(jax.jit, static_argnames=("placed",))
def _sums(x: jax.Array, *weights: jax.Array, placed: NamedSharding | None) -> jax.Array:
    """Return the two weighted sums of each device's shard of an array, [devices, 2] uint32.

    The devices do not communicate. With a collective operation per array, each program would wait
    for the other processes, and two such programs that overlap can deadlock on CPUs.
    """
    if placed is None:
        return _local_sums(x, *weights)[None]
    mesh, spec = placed.mesh, placed.spec
    used = {name for entry in spec if entry is not None
            for name in (entry if isinstance(entry, tuple) else (entry,))}
    copies = [name for name in mesh.axis_names if name not in used]

    def part(*local: jax.Array) -> jax.Array:
        sums = _local_sums(*local)
        for name in copies:  # a replicated shard is counted on only one device
            sums = jnp.where(jax.lax.axis_index(name) == 0, sums, jnp.zeros_like(sums))
        return sums[None]

    row, column = PartitionSpec(*spec[:-1]), PartitionSpec(*spec[-1:])
    return jax.shard_map(part, mesh=mesh, in_specs=(spec, row, row, column, column),
                         out_specs=PartitionSpec(mesh.axis_names), check_vma=False)(x, *weights)


def _local_sums(x: jax.Array, row_a: jax.Array, row_b: jax.Array, column_a: jax.Array,
                column_b: jax.Array) -> jax.Array:
    bits = _scrambled(_bfloat16_bits(x))

    def weighted(row: jax.Array, column: jax.Array) -> jax.Array:
        return bits * row[..., None] * jax.lax.expand_dims(column, range(x.ndim - 1))

    # On XLA's CPU backend, one reduction for both sums is fifty times as fast as two reductions.
    both = weighted(row_a, column_a), weighted(row_b, column_b)
    return jnp.stack(jax.lax.reduce(both, (np.uint32(0),) * 2, _add, tuple(range(x.ndim))))


def _add(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any]:
    return one[0] + other[0], one[1] + other[1]


def _bfloat16_bits(x: jax.Array) -> jax.Array:
    """Return the bits of x rounded to bfloat16, as uint32; every NaN has the same bits.

    Rounding uses integer arithmetic, because conversions on some processors flush subnormals to 0.
    """
    if x.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
        nan = (bits & np.uint32(0x7FFF)) > np.uint32(0x7F80)
    else:
        wide = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        nan = (wide & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        half = np.uint32(0x7FFF) + (wide >> np.uint32(16) & np.uint32(1))  # ties to even
        bits = (wide + half) >> np.uint32(16)
    return jnp.where(nan, np.uint32(0x7FC0), bits)


def _scrambled(bits: jax.Array) -> jax.Array:
    """Scramble the 32 bits of each value by a bijection.

    Otherwise a change of sign would flip only bit 15 of a value, and therefore change only bits 15
    to 31 of its product with a position's factor (`_weights`) modulo 2³².
    """
    wide = bits * np.uint32(0x9E3779B1)
    return wide ^ (wide >> np.uint32(15))
