"""Copies of a model's parameters: layouts with faster matrix products, and int8 weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpersona.distributed.sharding import default_device, mesh_of, platform
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.int8 import Int8, quantized
from jaxpersona.models.params import Layer, Params, Spec, collect_sums, dispatch_sums, layout
from jaxpersona.models.weight import F32, Dense, Weight, joined, transposed

# number of input dimensions of the weight of each linear layer in a block
PRODUCTS = {"wq_nhd": 1, "wk_khd": 1, "wv_khd": 1, "wo_dnh": 2, "w_gate_fd": 1, "w_up_fd": 1,
            "w_down_df": 1}
TABLES = {"embed_vd": 1, "head_vd": 1}  # number of input dimensions of embedding and output head
_QKV = ("wq_nhd", "wk_khd", "wv_khd")
_GATE_UP = ("w_gate_fd", "w_up_fd")


if TYPE_CHECKING:
    from jaxpersona.models.model import Model

_LARGEST_COPY = 8e9  # maximum size in bytes of a float32 model that is copied on a CPU


def fast_params(model: Model, rows: int) -> Params:
    """Return a model's parameters in the layout with the fastest matrix products on its device.

    The layout depends only on the model, the device and the number of rows, so repeated runs give
    bit-identical results. On a CPU, float32 models up to 8 GB are copied and transposed (`in_out`)
    for 8 rows or more. On a GPU, some weights are copied and joined (`with_joined`) if all weights
    and the copies fit into half of the device memory. In all other cases, including meshes,
    quantized weights and adapters, the result is `model.params`.

    The copy is made once per `Model` and freed with the `Model`. If `model` has no attribute
    `derived`, every call makes a copy.
    """
    params, config = model.params, model.config
    device, dtype = platform(params.like), params.like.dtype
    if model.mesh is not None or _has_weights(params):
        return params  # sharded, quantized or with an adapter
    if device == "cpu" and dtype == F32 and rows >= 8 and config.bytes(4) <= _LARGEST_COPY:
        make = in_out
    elif device == "gpu" and _copy_fits(params, config, _memory(params)):
        make = with_joined
    else:
        return params
    derived = getattr(model, "derived", None)
    return make(params) if derived is None else derived.get(params, make)


def _has_weights(params: Params) -> bool:
    """Return whether any parameter is a `Weight` instead of an array."""
    return any(isinstance(x, Weight) for x in
               jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Weight)))


def _copy_fits(params: Params, config: ModelConfig, memory: int) -> bool:
    """Return whether the weights and the `with_joined` copies fit in half of `memory` bytes."""
    copied = sum(getattr(layer, name).nbytes for layer in params.layers
                 for name in (*_QKV, *_GATE_UP))
    return 2 * (config.bytes(params.embed_vd.dtype.itemsize) + copied) <= memory


def _memory(params: Params) -> int:
    """Return the number of bytes that JAX may allocate on the weights' device, or 0 if unknown.

    Unlike the free memory, this limit is constant, so `fast_params` always chooses the same layout.
    """
    embed = params.embed_vd
    device: Any = next(iter(embed.devices())) if isinstance(embed, jax.Array) else default_device()
    return (device.memory_stats() or {}).get("bytes_limit", 0)


@jax.jit
def in_out(params: Params) -> Params:
    """Return parameters with the linear layers and the output head copied to `InOut` weights.

    On CPUs, XLA's float32 matrix product reorders an [out, in] weight in every call if the batch
    has several rows, which doubles the time for 8 rows. For one row, [out, in] order is faster.
    """
    layers = tuple(
        layer.replace(**{name: transposed(getattr(layer, name), inner)
                         for name, inner in PRODUCTS.items()})
        for layer in params.layers)
    head = params.embed_vd if params.head_vd is None else params.head_vd
    return params.replace(layers=layers, head_vd=transposed(head))


def with_joined(params: Params) -> Params:
    """Return parameters with joined q, k and v weights, and joined gate and up weights.

    The joined weights (`Joined`) are copies; the other weights are shared with `params`. A GPU
    reads one large weight at a higher bandwidth than several small weights.
    """
    return params.replace(layers=tuple(_joined(layer, Dense) for layer in params.layers))


@functools.partial(jax.jit, static_argnames="form")
def _join(weights: list[jax.Array], form: Callable[[jax.Array], Weight]) -> Weight:
    return joined(weights, form)


@functools.partial(jax.jit, static_argnames="inner")
def _quantize(w: jax.Array, inner: int) -> Weight:
    return quantized(w, inner)


def _joined(layer: Layer, form: Callable[[jax.Array], Weight]) -> Layer:
    qkv, gate_up = ([getattr(layer, name) for name in names] for names in (_QKV, _GATE_UP))
    return layer.replace(joined_qkv=_join(qkv, form=form), joined_gate_up=_join(gate_up, form=form),
                         **dict.fromkeys((*_QKV, *_GATE_UP)))


def in_int8(params: Params, *, join: bool = False, tables: bool = True) -> Params:
    """Quantize the weights of all linear layers in the blocks to int8 (`Int8`).

    Without `join`, the result has the same fingerprint as `params`. Norms and biases keep their
    dtype.

    Args:
      params: the unquantized parameters, as plain arrays.
      join: whether to join weights with the same input (`with_joined`).
      tables: whether to quantize the embedding and the output head too. A tied head stays tied.
    """
    def one(holder: Any, names: Mapping[str, int]) -> Any:
        found = {name: getattr(holder, name) for name in names}
        return holder.replace(**{name: quantize(w, names[name]) for name, w in found.items()
                                 if w is not None})

    layers = tuple(one(_joined(layer, quantized) if join else layer, PRODUCTS)
                   for layer in params.layers)
    made = (one(params, TABLES) if tables else params).replace(layers=layers)
    return made if join else with_origin(made, params)


def quantize(w: jax.Array, inner: int) -> Int8:
    """Quantize an array, sharded or not, and wait for the result.

    Waiting limits the temporary memory to one float32 array. It also prevents a deadlock between
    several CPU processes, where two programs with collective operations must not overlap.
    """
    return jax.block_until_ready(_quantize(w, inner))


def with_origin(made: Params, floats: Params) -> Params:
    """Return quantized parameters with `Int8.made_from` set.

    Args:
      made: the quantized parameters.
      floats: the parameters before quantization.
    """
    whole, tree = jax.tree.flatten(made, is_leaf=_is_int8)
    before = tree.flatten_up_to(floats)
    chosen = [i for i, w in enumerate(whole) if _is_int8(w)]
    return jax.tree.unflatten(tree, originated(
        whole, collect_sums(dispatch_sums([before[i] for i in chosen]))))


def originated(weights: Sequence[Any], before: np.ndarray) -> list[Any]:
    """Return weights with `Int8.made_from` set for the n int8 weights among them.

    Args:
      weights: int8 weights and other values; the other values are returned unchanged.
      before: [n, 2] uint32, the fingerprint sums of each int8 weight before quantization.
    """
    held = [w for w in weights if _is_int8(w)]
    parts = dispatch_sums([x for w in held for x in (w.value, w.scale)])
    own = collect_sums(parts).reshape(-1, 2, 2)
    sums = np.concatenate([before[:, None], own], 1)  # [n, 3, 2]

    def place_of(w: Int8) -> Any:
        mesh = mesh_of(w.value)
        return w.scale.sharding if mesh is None else NamedSharding(mesh, PartitionSpec())

    placed = iter(jax.device_put(list(sums), [place_of(w) for w in held]))
    return [w.replace(made_from=next(placed)) if _is_int8(w) else w for w in weights]


def int8_layout(config: ModelConfig, *, tables: bool = True) -> Params:
    """Return a `Params` with the `Spec` of every array of a model with int8 weights."""
    def one(holder: Any, names: Iterable[str]) -> Any:
        return holder.replace(**{name: _int8_spec(spec) for name in names
                                 if (spec := getattr(holder, name)) is not None})

    whole = layout(config)
    layers = tuple(one(layer, PRODUCTS) for layer in whole.layers)
    return (one(whole, TABLES) if tables else whole).replace(layers=layers)


def _int8_spec(spec: Spec) -> Int8:
    at = len(spec.shape) - spec.inner
    made: Any = Int8  # typed as Any, because `Int8` declares its fields as arrays, not specs
    return made(dataclasses.replace(spec, dtype="int8"),
                Spec(spec.shape[:at], spec.axes[:at], dtype="float32"), inner=spec.inner)


def _is_int8(x: Any) -> bool:
    return isinstance(x, Int8)
