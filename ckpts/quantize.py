"""Load a checkpoint's weights in int8, one tensor at a time.

Each matrix to quantize is read in float32, placed on its devices and quantized, unless its stored
int8 values are used. At most the current float matrix and a few prefetched ones are in memory. Each
int8 weight keeps the fingerprint sums of its float weight (`Int8.made_from`), so the int8 model has
the same fingerprint as the float model.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxpersona.ckpts import names
from jaxpersona.ckpts.adapter import add_pair, read_adapter
from jaxpersona.ckpts.names import EMBED, HEAD, Tensor
from jaxpersona.ckpts.source import Progress, TensorSource, ahead, place
from jaxpersona.ckpts.tensorfile import parse_dtype

from jaxpersona.brief import shown
from jaxpersona.distributed import sharding
from jaxpersona.errors import UserError
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.int8 import Int8, dequantized
from jaxpersona.models.params import Params, collect_sums, dispatch_sums
from jaxpersona.models.prepared import originated, quantize

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

Blocks = Callable[[str], tuple[np.ndarray, np.ndarray] | None]
INT8 = np.dtype(np.int8)
_TABLES = ("int8", "float")


@dataclasses.dataclass(frozen=True)
class Form:
    """The dtypes in which `load` loads a model, and the adapter to check or merge.

    Attributes:
      dtype: the dtype of the activations and of weights that are not int8.
      int8: whether the matrices are quantized.
      tables: whether the embedding and the output head are also quantized. None means that the
        caller did not specify it; both are then quantized.
      given: whether the caller chose the dtype of the weights.
      adapter: the folder of the adapter to check before the weights are read, or None.
      merge: the folder of an adapter to add to the weights before they are quantized, or None.
    """

    dtype: np.dtype
    int8: bool = False
    tables: bool | None = None
    given: bool = False
    adapter: pathlib.Path | None = None
    merge: pathlib.Path | None = None


def parse_form(dtype: DTypeLike | None, activations: DTypeLike | None, tables: str | None,
               default: np.dtype) -> Form:
    """Convert arguments of `load` to a `Form`.

    Args:
      dtype, activations, tables: as for `load`.
      default: the dtype of the weights if `dtype` is None; the dtype of the activations if `dtype`
        is int8 and `activations` is None.

    Raises:
      UserError: an argument is invalid, or `activations` or `tables` is given but `dtype` is not
        int8.
    """
    if not _is_int8(dtype):
        for name, value in (("activations", activations), ("tables", tables)):
            if value is not None:
                raise UserError(f"{name} is {shown(value, 60)}, but it applies only to "
                                f"dtype='int8'; omit {name}, or use dtype='int8'")
        try:
            return Form(default if dtype is None else parse_dtype(dtype), given=dtype is not None)
        except UserError as error:
            raise UserError(f"{error}, int8") from None
    if tables not in (None, *_TABLES):
        raise UserError(f"tables is {shown(tables, 60)}; it must be one of {', '.join(_TABLES)}")
    try:
        kind = default if activations is None else parse_dtype(activations)
    except UserError as error:
        raise UserError(f"activations: {error}") from None
    return Form(kind, int8=True, tables=None if tables is None else tables == "int8", given=True)


def _is_int8(dtype: DTypeLike | None) -> bool:
    if isinstance(dtype, str) or dtype is None:
        return dtype == "int8"
    try:
        return np.dtype(dtype) == INT8
    except (TypeError, ValueError):  # `parse_dtype` raises the error
        return False


def load_int8(source: TensorSource, config: ModelConfig, form: Form, *, mesh: Mesh | None = None,
              progress: Progress | None = None, blocks: Blocks | None = None) -> Params:
    """Load all parameters; the matrices that `form` selects are quantized to int8.

    Args:
      source: the checkpoint, with every tensor of `names.tensors(config)` in the shape
        `Tensor.shape`.
      config: the model configuration.
      form: the dtypes and the adapter to merge.
      mesh: the mesh over which to shard the parameters; each process reads only its own shards.
      progress: called with (bytes read so far, total bytes).
      blocks: a function from a tensor's name to its stored int8 values and block scales, or to None
        if the checkpoint stores the tensor in another format; None if it stores no int8 values. The
        stored values and scales are used only on a CPU without a mesh, and only for tensors that no
        adapter changes. The other selected matrices are quantized from float32, with one scale per
        output channel: with block scales, a GPU or TPU would write a dequantized copy of the weight
        for every product, and on a mesh, block scales are not supported.

    Raises:
      UserError: the files are invalid, or the adapter or the mesh does not fit the model.
    """
    tensors, tree = jax.tree.flatten(names.tensors(config))
    total = sum(source.size(tensor.name) for tensor in tensors)
    updates = {} if form.merge is None else read_adapter(form.merge, config)
    fitted = None if mesh is None else sharding.fit(mesh, config)
    keep = fitted is None and sharding.default_platform() == "cpu"

    def chosen(tensor: Tensor) -> bool:
        return bool(tensor.spec.inner) and (
            form.tables is not False or tensor.name not in (EMBED, HEAD))

    def read(tensor: Tensor) -> Any:
        quantized = chosen(tensor)
        if quantized and keep and blocks is not None and tensor.name not in updates:
            stored = blocks(tensor.name)
            if stored is not None:
                return stored
        kind = np.dtype(np.float32) if quantized else form.dtype
        if fitted is not None:
            return place(source, tensor, kind, fitted)
        return source.read(tensor.name, None, kind).reshape(tensor.spec.shape)

    made, sums, done = [], [], 0
    for tensor, found in zip(tensors, ahead(read, tensors), strict=True):
        if isinstance(found, tuple):
            at = len(tensor.spec.shape) - tensor.spec.inner
            value, scale = found
            weight = Int8(jax.device_put(value.reshape(tensor.spec.shape)),
                          jax.device_put(scale.reshape(*tensor.spec.shape[:at], -1)),
                          inner=tensor.spec.inner)
            sums += jax.block_until_ready(dispatch_sums([_dense(weight)]))
        else:
            weight = found if fitted is not None else jax.device_put(found)
            if tensor.name in updates:
                weight = add_pair(weight, tensor.spec, updates[tensor.name])
            if chosen(tensor):
                sums += dispatch_sums([weight])
                weight = quantize(weight, tensor.spec.inner)
        made.append(weight)
        done += source.size(tensor.name)
        if progress is not None:
            progress(done, total)
    return jax.tree.unflatten(tree, originated(made, collect_sums(sums)))


@jax.jit
def _dense(w: Int8) -> jax.Array:
    """Dequantize an int8 weight to float32, to compute its fingerprint sums."""
    return dequantized(w)
