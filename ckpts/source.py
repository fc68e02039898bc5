"""Load the parameters of a checkpoint onto their devices.

`TensorSource` is implemented for safetensors and GGUF files. `load_params` reads at most a few
tensors at a time and copies each shard directly to its devices, so host memory never contains a
second copy of the whole model.
"""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxpersona.ckpts import names
from jaxpersona.ckpts.names import Tensor

from jaxpersona.distributed import sharding
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.params import Params

READERS = 3  # number of concurrent reads; several, because memory allocation can stall a thread
Progress = Callable[[int, int], None]


class TensorSource(Protocol):
    """The tensors of a checkpoint, by their Hugging Face names (`names.tensors`).

    Both methods must be thread-safe.
    """

    def size(self, name: str) -> int:
        """Return the size of a tensor in the files, in bytes."""
        ...

    def read(self, name: str, index: tuple[slice, ...] | None,
             dtype: np.dtype | None) -> np.ndarray:
        """Read a tensor, or a part of it, into a new array.

        Args:
          name: the tensor's Hugging Face name.
          index: unit-step slices, one per dimension of the shape in the file; None selects the
            whole tensor.
          dtype: the dtype of the result, float32, bfloat16 or float16. None keeps the stored dtype;
            a quantized tensor is dequantized to float32.
        """
        ...


def load_params(source: TensorSource, config: ModelConfig, *, dtype: np.dtype | None = None,
                mesh: Mesh | None = None, progress: Progress | None = None) -> Params:
    """Load all parameters of a model from a source.

    Args:
      source: the checkpoint, with every tensor of `names.tensors(config)` in the shape
        `Tensor.shape`.
      config: the model configuration.
      dtype: the dtype to cast to, float32, bfloat16 or float16. None keeps the stored dtypes;
        quantized tensors are dequantized to float32.
      mesh: the mesh over which to shard the parameters; each process reads only its own shards.
      progress: called with (bytes read so far, total bytes).

    Raises:
      UserError: the mesh does not fit the model (`sharding.fit`), or a tensor cannot be read.
    """
    tensors, tree = jax.tree.flatten(names.tensors(config))
    total = sum(source.size(tensor.name) for tensor in tensors)
    done, arrays = 0, []

    def read(tensor: Tensor) -> np.ndarray:
        return source.read(tensor.name, None, dtype).reshape(tensor.spec.shape)

    if mesh is None:
        placed = map(jax.device_put, ahead(read, tensors))
    else:
        fitted = sharding.fit(mesh, config)
        placed = ahead(lambda t: place(source, t, dtype, fitted), tensors)
    for tensor, array in zip(tensors, placed, strict=True):
        arrays.append(array)
        done += source.size(tensor.name)
        if progress is not None:
            progress(done, total)
    return jax.tree.unflatten(tree, arrays)


def ahead(read: Callable[[Tensor], Any], tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Yield `read(tensor)` for each tensor in order; threads prefetch at most `READERS` results."""
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for tensor in tensors:
            waiting.append(pool.submit(read, tensor))
            if len(waiting) > READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def place(source: TensorSource, tensor: Tensor, dtype: np.dtype | None, mesh: Mesh) -> jax.Array:
    """Read one tensor as a sharded array; each process reads each of its own shards only once."""
    shape, axes = tensor.spec.shape, tensor.spec.axes
    placed = sharding.weight_sharding(axes, shape, mesh)
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in placed.addressable_devices_indices_map(shape).items():
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        holders.setdefault(ranges, []).append(device)
    shards = []
    for ranges, devices in holders.items():
        part = source.read(tensor.name, names.file_index(tensor, list(ranges)), dtype)
        part = part.reshape([stop - start for start, stop in ranges])
        shards += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, placed, shards)
