"""Estimates of a model's memory and roofline times on a mesh of chips, without a compiler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxpersona.distributed import sharding
from jaxpersona.errors import UserError
from jaxpersona.kernels.attention import attention_implementation
from jaxpersona.models.cache import KV_AXES
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.nn import QUERY_CHUNK
from jaxpersona.models.params import Params, layout
from jaxpersona.models.prepared import int8_layout
from jaxpersona.planning import chips

Weights = Literal["bfloat16", "int8"]  # dtypes of the weights; activations are bfloat16
ITEM = 2  # number of bytes per bfloat16 value
FRACTIONS = (1.0, 0.6, 0.3)  # fractions of roofline speed at which `axis_run_hours` is estimated
# number of rollouts for the published axis (Lu et al. 2026): 276 roles × 1,200 rollouts per role
ROLLOUTS = 331_200
NEW_TOKENS = 512  # maximum number of tokens per reply in these rollouts


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Static shapes: the number of rows, the padded prompt length and the cache slots per row."""

    batch: int
    width: int
    slots: int

    @classmethod
    def of(cls, batch: int, context: int) -> Shapes:
        """Return shapes with 1/4 of the slots (at least 1, at most `NEW_TOKENS`) for the reply."""
        return cls(batch, context - max(1, min(NEW_TOKENS, context // 4)), context)

    @property
    def new(self) -> int:
        """The maximum number of reply tokens."""
        return self.slots - self.width


def abstract_weights(config: ModelConfig, mesh: Mesh | AbstractMesh, dtype: Weights) -> Params:
    """Return the parameters as a tree of `jax.ShapeDtypeStruct`, including their shardings.

    Raises:
      UserError: `dtype` is not one of `Weights`.
    """
    if dtype not in get_args(Weights):
        raise UserError(f"dtype is {dtype!r:.60}; it must be one of {', '.join(get_args(Weights))}")
    specs = int8_layout(config) if dtype == "int8" else layout(config)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(
        s.shape, s.dtype or jnp.bfloat16,
        sharding=sharding.weight_sharding(s.axes, s.shape, mesh)), specs)


def weight_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh,
                 dtype: Weights = "bfloat16") -> int:
    """Return the size in bytes of one chip's parameter shards, including int8 scales."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(abstract_weights(config, mesh, dtype)))


def step_bytes(config: ModelConfig, dtype: Weights) -> int:
    """Return the number of weight bytes that one copy of the model reads per decode step.

    An input embedding that is not tied to the output head is excluded, because a step reads
    only one of its rows per token.
    """
    if dtype == "bfloat16":
        return config.step_bytes(ITEM)
    whole = int8_layout(config)
    read = whole if config.tied_embeddings else whole.replace(embed_vd=None)
    return sum(math.prod(s.shape) * np.dtype(s.dtype or jnp.bfloat16).itemsize
               for s in jax.tree.leaves(read))


def cache_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, shapes: Shapes) -> int:
    """Return the size in bytes of one chip's shard of the KV cache."""
    whole = (shapes.batch, config.n_kv_heads, shapes.slots, config.head_dim)
    shard = NamedSharding(mesh, sharding.spec(KV_AXES, mesh)).shard_shape(whole)
    return 2 * config.n_layers * ITEM * math.prod(shard)


def activation_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, shapes: Shapes,
                     chip: chips.Chip) -> int:
    """Estimate the temporary memory of a prefill in bytes per chip, without a compiler.

    On a GPU, the estimate is the larger of two sums. The sum for the MLP includes the gate and up
    projections, the residual stream, the normalized residual stream and the block's output. The sum
    for attention includes two copies of the queries and, without cuDNN, the float32 scores of one
    query chunk and their bfloat16 softmax. `bench/ahead.py` compares the estimate with XLA's value
    for an H200.

    On a TPU, the estimate is the sum of two bfloat16 arrays and one float32 array of the residual
    stream's size, the float32 gate and up projections of the MLP and, without splash attention, two
    float32 copies of the scores of one query chunk. `plan` uses this estimate if libtpu is not
    installed.
    """
    split = sharding.ways(mesh, "ff")
    rows = shapes.batch // sharding.ways(mesh, "batch")
    tokens, queries = rows * shapes.width, min(shapes.width, QUERY_CHUNK)
    scores = rows * config.n_heads // split * queries * shapes.slots
    if chip.name in chips.TPUS:
        form, _ = attention_implementation(config, "tpu", dtype=jnp.bfloat16, tokens=shapes.width,
                                           fresh=True, sharded=mesh.size > 1)
        return tokens * (config.d_model * (2 * ITEM + 4) + 2 * 4 * config.d_ff // split
                         ) + 2 * 4 * scores * (form == "xla")
    mlp = tokens * ITEM * (2 * config.d_ff // split + 3 * config.d_model)
    attention = tokens * ITEM * 2 * config.n_heads * config.head_dim // split
    form, _ = attention_implementation(config, "gpu", dtype=jnp.bfloat16, tokens=shapes.width,
                                       fresh=True, capability=8.0, sharded=mesh.size > 1)
    return max(mlp, attention + (4 + ITEM) * scores * (form == "xla"))


def seconds(config: ModelConfig, mesh: Mesh | AbstractMesh, shapes: Shapes,
            chip: chips.Chip, dtype: Weights = "bfloat16") -> dict[str, float]:
    """Return the roofline times of a decode step and of a prefill.

    A decode step is assumed to read the weights (`step_bytes`) once and, for every row, the keys
    and values of the prompt and of half the reply. If the matrix products take longer than reading
    the weights, their compute time is used instead. A prefill is assumed to be compute bound.
    All-reduces over the n chips of the model axis are assumed to be ring all-reduces, in which each
    chip sends 2·(n − 1)/n of the bytes over its links, without overlap with compute.

    Returns:
      The times in seconds of a decode step (`decode_step`) and of a prefill (`prefill`), and the
      parts of these times that are spent in all-reduces (`decode_sums`, `prefill_sums`).
    """
    split, ways = sharding.ways(mesh, "ff"), sharding.ways(mesh, "batch")
    rows = shapes.batch // ways
    weights = step_bytes(config, dtype) / split
    length = shapes.width + shapes.new // 2
    held = rows * config.cache_bytes(length, ITEM) / sharding.ways(mesh, "kv_heads")
    compute = 2 * rows * config.step_bytes(1) / split / chip.peak
    exchange = 2 * (split - 1) / split * 2 * config.n_layers * rows * config.d_model * ITEM
    step = held / chip.bandwidth + max(weights / chip.bandwidth, compute)
    whole = rows * config.prefill_flops(shapes.width) / split / chip.peak
    sums = {"decode": exchange / chip.link, "prefill": exchange * shapes.width / chip.link}
    return {"decode_step": step + sums["decode"], "decode_sums": sums["decode"],
            "prefill": whole + sums["prefill"], "prefill_sums": sums["prefill"]}


def run_hours(roofline: Mapping[str, float], shapes: Shapes, fraction: float) -> float:
    """Return the hours needed to generate `ROLLOUTS` rollouts at a fraction of roofline speed.

    `roofline` is the result of `seconds`. Every reply is assumed to have `NEW_TOKENS` tokens.
    """
    batches = -(-ROLLOUTS // shapes.batch)
    one = roofline["prefill"] + NEW_TOKENS * roofline["decode_step"]
    return batches * one / fraction / 3600
