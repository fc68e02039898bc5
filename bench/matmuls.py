"""Benchmark the matrix products of one block, in several weight layouts and dtypes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from compiled import attempt, timed

from jaxpersona.models.config import ModelConfig


def products(config: ModelConfig, kind: str, small: bool) -> dict[str, Any]:
    """Time a block's matmuls for 1 and 32 rows, in several weight layouts and dtypes.

    Each form (a layout, a dtype and an operation) is timed for a d_ff × d_model weight. The
    multiply-sum forms are timed only with 1 row. Joined weights are compared with separate ones
    for the query, key and value projections and for the gate and up projections.
    """
    d, f = config.d_model, config.d_ff
    count = 4 if small else 12  # enough weights to exceed the L2 cache
    dtype = jnp.dtype(kind)
    keys = jax.random.split(jax.random.key(0), count)
    weights = [jax.random.normal(key, (f, d), jnp.float32) * 0.02 for key in keys]
    scale = [jnp.abs(w).max(-1) / 127 for w in weights]
    whole = [jnp.round(w / s[:, None]).astype(jnp.int8)
             for w, s in zip(weights, scale, strict=True)]
    plain = [w.astype(dtype) for w in weights]
    turned = [jnp.array(w.T) for w in plain]
    del weights
    f32: Any = jnp.float32

    def plain_form(x: jax.Array, w: jax.Array, s: jax.Array) -> jax.Array:
        return jnp.einsum("rd,fd->rf", x, w, preferred_element_type=f32)

    def in_out_form(x: jax.Array, w: jax.Array, s: jax.Array) -> jax.Array:
        return jnp.einsum("rd,df->rf", x, w, preferred_element_type=f32)

    def converted(x: jax.Array, w: jax.Array, s: jax.Array) -> jax.Array:
        return jnp.einsum("rd,fd->rf", x, w.astype(x.dtype), preferred_element_type=f32) * s

    def mixed(x: jax.Array, w: jax.Array, s: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())),
                                   preferred_element_type=f32) * s

    def summed(x: jax.Array, w: jax.Array, s: jax.Array) -> jax.Array:
        wide = w.astype(f32)
        return jnp.sum(x.astype(f32)[:, None, :] * wide[None], -1) * s

    def summed_plain(x: jax.Array, w: jax.Array, s: jax.Array) -> jax.Array:
        return jnp.sum(x.astype(f32)[:, None, :] * w.astype(f32)[None], -1)

    forms = {"plain [f,d]": (plain_form, plain), "plain [d,f]": (in_out_form, turned),
             "int8 converted": (converted, whole), "int8 dot_general": (mixed, whole),
             "int8 multiply-sum": (summed, whole), "multiply-sum": (summed_plain, plain)}
    found: dict[str, Any] = {}
    for rows in (1, 32):
        x = jax.random.normal(jax.random.key(1), (rows, d), dtype)
        for name, (form, w) in forms.items():
            if rows > 1 and "sum" in name:
                continue

            def all_of_them(x: jax.Array, w: Any, s: Any, form: Any = form) -> Any:
                total = jnp.zeros((), f32)
                for i in range(count):
                    y = form(x, w[i], s[i])
                    total += y.sum()
                    # each matmul depends on the previous one, so they run in sequence
                    x = (x + y[:, :1] * 0).astype(x.dtype)
                return total

            found[f"{rows} rows, {name}"] = attempt(
                timed, jax.jit(all_of_them), (x, w, scale), count, w[0].nbytes)
    n, k, h = config.n_heads, config.n_kv_heads, config.head_dim
    for name, sizes in (("q, k, v", (n * h, k * h, k * h)), ("gate, up", (f, f))):
        apart = [tuple(w[:size] + 0 for size in sizes) for w in plain]
        joined = [jnp.concatenate(parts) for parts in apart]
        for rows in (1, 32):
            x = jax.random.normal(jax.random.key(1), (rows, d), dtype)

            def several(x: jax.Array, weights: Any, _: Any) -> jax.Array:
                total = jnp.zeros((), f32)
                for parts in weights:
                    ys = [plain_form(x, w, w) for w in parts]
                    total += sum(y.sum() for y in ys)
                    x = (x + ys[0][:, :1] * 0).astype(x.dtype)
                return total

            for form, weights in (("apart", apart), ("together", [(w,) for w in joined])):
                size = sum(w.nbytes for w in weights[0])
                found[f"{rows} rows, {name} {form}"] = attempt(
                    timed, jax.jit(several), (x, weights, None), count, size)
        del apart, joined
    return {"shape": [f, d], "weights": count, "forms": found}
