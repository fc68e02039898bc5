"""Copies of a model's parameters in the layout with the fastest matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from jaxpersona.distributed.sharding import default_device, platform
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.params import Layer, Params
from jaxpersona.models.weight import F32, Dense, Weight, joined, quantized, transposed

# the weights in a block's matrix products, and how many input dimensions each has
PRODUCTS = {"wq_nhd": 1, "wk_khd": 1, "wv_khd": 1, "wo_dnh": 2, "w_gate_fd": 1, "w_up_fd": 1,
            "w_down_df": 1}
_QKV = ("wq_nhd", "wk_khd", "wv_khd")
_GATE_UP = ("w_gate_fd", "w_up_fd")


if TYPE_CHECKING:
    from jaxpersona.models.model import Model

_LARGEST_COPY = 8e9  # bytes; larger models are not copied on a CPU


def fast_params(model: Model, rows: int) -> Params:
    """Return the parameters in the layout with the fastest matrix products on their device.

    The layout depends only on the model, the device and the number of rows, so equal calls give
    bit-identical results. On a CPU, models up to 8 GB in float32 are copied and transposed
    (`in_out`) for 8 rows or more. On a GPU, some weights are copied and joined (`with_joined`) if
    all weights and the copy fit into half of the memory. In all other cases, including meshes, the
    result is `model.params`.

    The copy is made once per `Model` and freed with it. For other classes with the same
    attributes, a copy is made at every call.
    """
    params, config = model.params, model.config
    device, dtype = platform(params.embed_vd), params.embed_vd.dtype
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
    """Return whether all weights and `with_joined`'s copy fit into half of `memory` bytes."""
    copied = sum(getattr(layer, name).nbytes for layer in params.layers
                 for name in (*_QKV, *_GATE_UP))
    return 2 * (config.bytes(params.embed_vd.dtype.itemsize) + copied) <= memory


def _memory(params: Params) -> int:
    """Return the bytes that JAX may allocate on the weights' device, or 0 if the limit is unknown.

    Unlike the free memory, this limit is constant, so the choice of a layout is reproducible.
    """
    embed = params.embed_vd
    device: Any = next(iter(embed.devices())) if isinstance(embed, jax.Array) else default_device()
    return (device.memory_stats() or {}).get("bytes_limit", 0)


@jax.jit
def in_out(params: Params) -> Params:
    """Copy the weights of all matrix products, including a tied head, to [in, out] (`InOut`).

    On CPUs, XLA's float32 product repacks an [out, in] weight at each call if the batch has several
    rows; with 8 rows this takes twice as long. With one row, [out, in] is faster.
    """
    layers = tuple(
        layer.replace(**{name: transposed(getattr(layer, name), inner)
                         for name, inner in PRODUCTS.items()})
        for layer in params.layers)
    head = params.embed_vd if params.head_vd is None else params.head_vd
    return params.replace(layers=layers, head_vd=transposed(head))


def with_joined(params: Params) -> Params:
    """Copy the q, k and v weights into one array, and gate and up into another (`Joined`).

    A GPU reads one large weight at a higher bandwidth than several small ones. The other weights
    are shared with `params`.
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


def in_int8(params: Params, *, join: bool = False, head: bool = True) -> Params:
    """Quantize the weights of all matrix products to int8 (`Int8`).

    Args:
      params: parameters that are plain arrays.
      join: also join weights with the same input (`with_joined`).
      head: also quantize the output head. A tied head is copied first, because the embedding is
        not quantized.
    """
    layers = []
    for layer in params.layers:
        names = dict(PRODUCTS)
        if join:
            layer = _joined(layer, quantized)
            for name in (*_QKV, *_GATE_UP):
                del names[name]
        layers.append(layer.replace(**{name: _quantize(getattr(layer, name), inner)
                                       for name, inner in names.items()}))
    weight = params.embed_vd if params.head_vd is None else params.head_vd
    return params.replace(layers=tuple(layers),
                          head_vd=_quantize(weight, 1) if head else params.head_vd)
