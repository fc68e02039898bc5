"""Names and shapes of a model's tensors in Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxpersona.ckpts.tensorfile import DTYPES

from jaxpersona.errors import UserError
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.int8 import Int8
from jaxpersona.models.params import Layer, Params, Spec, layout

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FIELDS = {
    "attn_norm_d": "input_layernorm.weight",
    "wq_nhd": "self_attn.q_proj.weight", "bq_nh": "self_attn.q_proj.bias",
    "wk_khd": "self_attn.k_proj.weight", "bk_kh": "self_attn.k_proj.bias",
    "wv_khd": "self_attn.v_proj.weight", "bv_kh": "self_attn.v_proj.bias",
    "wo_dnh": "self_attn.o_proj.weight", "bo_d": "self_attn.o_proj.bias",
    "q_norm_h": "self_attn.q_norm.weight", "k_norm_h": "self_attn.k_norm.weight",
    "w_gate_fd": "mlp.gate_proj.weight", "b_gate_f": "mlp.gate_proj.bias",
    "w_up_fd": "mlp.up_proj.weight", "b_up_f": "mlp.up_proj.bias",
    "w_down_df": "mlp.down_proj.weight", "b_down_d": "mlp.down_proj.bias",
    "mlp_norm_d": "post_attention_layernorm.weight",
}
# with `post_norms`, a block has two more norms, and post_attention_layernorm is the norm after the
# attention instead of the norm before the MLP
_POST_NORMS = {
    "attn_post_norm_d": "post_attention_layernorm.weight",
    "mlp_norm_d": "pre_feedforward_layernorm.weight",
    "mlp_post_norm_d": "post_feedforward_layernorm.weight",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The name and shape of a parameter in Hugging Face files, and its `Spec` in `Params`.

    Attributes:
      name: the tensor's name in the files.
      shape: the tensor's shape in the files: [out, in] for a matrix, [n] for a norm or bias. Head
        axes are flattened.
      spec: the shape, logical axes and initializer of the parameter in `Params`.
    """

    name: str
    shape: tuple[int, ...]
    spec: Spec


def tensors(config: ModelConfig) -> Params:
    """Return a `Params` that contains the `Tensor` of each parameter instead of its array."""
    specs = layout(config)
    fields = _FIELDS | _POST_NORMS if config.post_norms else _FIELDS

    def layer(i: int, specs: Layer) -> Layer:
        return specs.replace(**{
            field: Tensor(f"model.layers.{i}.{name}", _file_shape(spec), spec)
            for field, name in fields.items() if (spec := getattr(specs, field)) is not None})

    def one(name: str, spec: Spec) -> Tensor:
        return Tensor(name, _file_shape(spec), spec)

    return Params(
        embed_vd=one(EMBED, specs.embed_vd),
        layers=tuple(layer(i, one_layer) for i, one_layer in enumerate(specs.layers)),
        final_norm_d=one("model.norm.weight", specs.final_norm_d),
        head_vd=None if specs.head_vd is None else one(HEAD, specs.head_vd),
    )


def _file_shape(spec: Spec) -> tuple[int, ...]:
    if not spec.inner:
        return (math.prod(spec.shape),)
    at = len(spec.shape) - spec.inner
    return math.prod(spec.shape[:at]), math.prod(spec.shape[at:])


def file_index(tensor: Tensor, ranges: list[tuple[int, int]]) -> tuple[slice, ...]:
    """Map index ranges of a parameter to slices of its tensor in the file.

    A dimension in the file is either one dimension of the parameter or several flattened dimensions
    (heads × head_dim). Only the first of several flattened dimensions may be sharded, because a
    head is never split over devices.

    Args:
      tensor: the tensor.
      ranges: a half-open range (start, stop) for each dimension of the parameter.

    Returns:
      A slice for each dimension of the tensor in the file.

    Raises:
      UserError: a flattened dimension other than the first is sharded.
    """
    shape = tensor.spec.shape
    out, at = [], 0
    for extent in tensor.shape:
        first, inner = at, 1
        at += 1
        while shape[first] * inner < extent:
            if ranges[at] != (0, shape[at]):
                raise UserError(f"{tensor.name}: a head cannot be sharded over devices")
            inner *= shape[at]
            at += 1
        out.append(slice(ranges[first][0] * inner, ranges[first][1] * inner))
    return tuple(out)


def named(params: Params, config: ModelConfig, *,
          int8: bool = False) -> dict[str, tuple[Tensor, Any]]:
    """Return a dict from tensor name to (`Tensor`, array) for every parameter.

    Args:
      params, config: the parameters and their configuration.
      int8: whether `Int8` weights are allowed; each is returned instead of an array.

    Raises:
      UserError: the structure, a shape or a dtype does not match the configuration, or `params` has
        int8 weights and `int8` is False.
    """
    expected, tree = jax.tree.flatten(tensors(config))
    arrays, structure = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Int8))
    if structure != tree:
        raise UserError("the tree structure of params does not match the configuration")
    if not int8 and any(isinstance(x, Int8) for x in arrays):
        raise UserError("params has int8 weights, which cannot be stored in a Hugging Face folder; "
                        "use ckpts.orbax.save, or load the model in float32 or bfloat16")
    faults = [
        f"{tensor.name}: {array.dtype}{list(array.shape)}, expected {list(tensor.spec.shape)} in "
        "float32, bfloat16 or float16"
        for tensor, array in zip(expected, arrays, strict=True)
        if array.shape != tensor.spec.shape or (
            not isinstance(array, Int8) and np.dtype(array.dtype) not in DTYPES.values())
    ]
    if faults:
        raise UserError("params do not match the configuration: " + "; ".join(faults))
    return {t.name: (t, a) for t, a in zip(expected, arrays, strict=True)}
