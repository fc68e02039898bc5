"""Parameters: one table with the shape, logical axes, initialiser and file name of every array.

The table (`layout`) serves initialisation, loading, saving, sharding and counting, so these cannot
disagree. Weights keep the `[out, in]` order of the files with heads split out, so that reading one
is a reshape: `wq_nhd` is q_proj's `[N·H, D]`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.config import ModelConfig
from jaxpersona.sharding import Axes, mesh_of, out_sharding


@flax.struct.dataclass
class Layer:
    """The parameters of one block; None where the family has no such array."""

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


@flax.struct.dataclass
class Params:
    """The parameters of a model: embedding, blocks, final norm, and a head where it is untied."""

    embed_vd: Any
    layers: tuple[Layer, ...]
    final_norm_d: Any
    head_vd: Any = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of one parameter before it has values.

    Attributes:
      shape, axes: its dimensions and their logical axes.
      file_name, file_shape: the tensor of a Hugging Face folder that holds it.
      init: standard deviation of its normal initialiser, or None for a norm at its identity.
    """

    shape: tuple[int, ...]
    axes: Axes
    file_name: str
    file_shape: tuple[int, ...]
    init: float | None = 0.02


def _layer_layout(config: ModelConfig, i: int) -> Layer:
    d, f = config.d_model, config.d_ff
    n, k, h = config.n_heads, config.n_kv_heads, config.head_dim
    prefix = f"model.layers.{i}"

    def norm(name: str, width: int) -> Spec:
        return Spec((width,), (None,), f"{prefix}.{name}.weight", (width,), None)

    def weight(name: str, shape: tuple[int, ...], axes: Axes, rows: int) -> Spec:
        size = 1
        for extent in shape:
            size *= extent
        return Spec(shape, axes, f"{prefix}.{name}.weight", (rows, size // rows))

    def bias(name: str, shape: tuple[int, ...], axes: Axes) -> Spec:
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        return Spec(shape, axes, f"{prefix}.{name}.bias", (size,))

    attn, mlp = "self_attn", "mlp"
    qkv, qk, post = config.qkv_bias, config.qk_norm, config.post_norms
    before_mlp = "pre_feedforward_layernorm" if post else "post_attention_layernorm"
    return Layer(
        attn_norm_d=norm("input_layernorm", d),
        wq_nhd=weight(f"{attn}.q_proj", (n, h, d), ("heads", None, "embed"), n * h),
        wk_khd=weight(f"{attn}.k_proj", (k, h, d), ("kv_heads", None, "embed"), k * h),
        wv_khd=weight(f"{attn}.v_proj", (k, h, d), ("kv_heads", None, "embed"), k * h),
        wo_dnh=weight(f"{attn}.o_proj", (d, n, h), ("embed", "heads", None), d),
        mlp_norm_d=norm(before_mlp, d),
        w_gate_fd=weight(f"{mlp}.gate_proj", (f, d), ("ff", "embed"), f),
        w_up_fd=weight(f"{mlp}.up_proj", (f, d), ("ff", "embed"), f),
        w_down_df=weight(f"{mlp}.down_proj", (d, f), ("embed", "ff"), d),
        bq_nh=bias(f"{attn}.q_proj", (n, h), ("heads", None)) if qkv else None,
        bk_kh=bias(f"{attn}.k_proj", (k, h), ("kv_heads", None)) if qkv else None,
        bv_kh=bias(f"{attn}.v_proj", (k, h), ("kv_heads", None)) if qkv else None,
        bo_d=bias(f"{attn}.o_proj", (d,), ("embed",)) if config.o_bias else None,
        q_norm_h=norm(f"{attn}.q_norm", h) if qk else None,
        k_norm_h=norm(f"{attn}.k_norm", h) if qk else None,
        b_gate_f=bias(f"{mlp}.gate_proj", (f,), ("ff",)) if config.mlp_bias else None,
        b_up_f=bias(f"{mlp}.up_proj", (f,), ("ff",)) if config.mlp_bias else None,
        b_down_d=bias(f"{mlp}.down_proj", (d,), ("embed",)) if config.mlp_bias else None,
        attn_post_norm_d=norm("post_attention_layernorm", d) if post else None,
        mlp_post_norm_d=norm("post_feedforward_layernorm", d) if post else None,
    )


def layout(config: ModelConfig) -> Params:
    """Describe every parameter of a model as a `Params` of `Spec`."""
    v, d = config.vocab_size, config.d_model
    axes: Axes = ("vocab", "embed")
    head = None if config.tied_embeddings else Spec((v, d), axes, "lm_head.weight", (v, d))
    return Params(
        embed_vd=Spec((v, d), axes, "model.embed_tokens.weight", (v, d)),
        layers=tuple(_layer_layout(config, i) for i in range(config.n_layers)),
        final_norm_d=Spec((d,), (None,), "model.norm.weight", (d,), None),
        head_vd=head,
    )


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Draw random parameters: normal weights (deviation 0.02), norms at their identity.

    They are drawn in float32 and rounded, so that a key means one model whatever its dtype.
    """
    specs, tree = jax.tree.flatten(layout(config))
    identity = 1.0 - config.norm_offset

    def draw(index: int, spec: Spec) -> jax.Array:
        if spec.init is None:
            return jnp.full(spec.shape, identity, dtype)
        sample = jax.random.normal(jax.random.fold_in(key, index), spec.shape, jnp.float32)
        return (sample * spec.init).astype(dtype)

    return jax.tree.unflatten(tree, [draw(i, spec) for i, spec in enumerate(specs)])


@flax.struct.dataclass
class InOut:
    """A weight that is stored [in, out] for a run, instead of the files' [out, in].

    Attributes:
      value: [in, out].
      out: the output's own dimensions (heads split out).
    """

    value: Any
    out: tuple[int, ...] = flax.struct.field(pytree_node=False)


# a block's products: how many of a weight's dimensions are the output's
_PRODUCTS = {"wq_nhd": 2, "wk_khd": 2, "wv_khd": 2, "wo_dnh": 1, "w_gate_fd": 1, "w_up_fd": 1,
             "w_down_df": 1}


@jax.jit
def in_out(params: Params) -> Params:
    """Copy every weight of a product to [in, out] (`InOut`), a tied head too.

    XLA's float32 product on a CPU packs an [out, in] weight anew at each call unless there is one
    row: with 8 rows that takes twice as long. One row is faster the other way round.
    """

    def turn(w: jax.Array, dims: int) -> InOut:
        out = w.shape[:dims]
        return InOut(w.reshape(math.prod(out), -1).T, out)

    layers = tuple(
        layer.replace(  # pyright: ignore[reportAttributeAccessIssue]
            **{name: turn(getattr(layer, name), dims) for name, dims in _PRODUCTS.items()})
        for layer in params.layers
    )
    head = params.embed_vd if params.head_vd is None else params.head_vd
    return params.replace(layers=layers, head_vd=turn(head, 1))  # pyright: ignore


def abstract_params(config: ModelConfig, dtype: Any = jnp.bfloat16) -> Params:
    """Return the parameters' shapes without their values, to compile for."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), layout(config))


def fingerprint(config: ModelConfig, params: Params) -> str:
    """Return sixteen hexadecimal digits for a model: its shape and a sample of its weights.

    The sample is the first 64 numbers of every array's first row rounded to bfloat16, so that one
    checkpoint has one fingerprint in float32 and bfloat16. Float16 rounds
    otherwise: loaded in it, the checkpoint counts as another model.
    """
    import hashlib

    import numpy as np

    def sample(x: jax.Array) -> jax.Array:
        if x.ndim > 1:  # on a mesh gathered to every device; a slice would have to divide it
            first: Any = 0 if mesh_of(x) is None else np.zeros(1, np.int32)
            x = x.at[(first,) * (x.ndim - 1)].get(out_sharding=out_sharding((None, None), x))
        elif (whole := out_sharding((None,), x)) is not None:
            x = jax.sharding.reshard(x, whole)
        return jax.lax.reduce_precision(x.reshape(-1)[:64].astype(jnp.float32), 8, 7)

    leaves = jax.tree.leaves(params)
    if mesh_of(leaves[0]) is None:
        pieces = [sample(x) for x in leaves]
    else:  # as one program, because processes that share the mesh must run the same ones in order
        pieces = jax.jit(lambda leaves: [sample(x) for x in leaves])(leaves)
    pieces = jax.device_get(pieces)
    digest = hashlib.sha256(b"".join(np.asarray(p, np.float32).tobytes() for p in pieces))
    return config.hash() + digest.hexdigest()[:8]
