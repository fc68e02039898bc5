"""Read and write `.pt` files with many tensors, as in the published Assistant Axis code.

Files are read with `torchfile.read_pickle`, so no code in a file is run.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np
from jaxpersona.ckpts.files import atomic
from jaxpersona.ckpts.torchfile import read_pickle

from jaxpersona.errors import UserError
from jaxpersona.extras import require

# maximum size of a file of response means; 1,200 rollouts of a 70B model take 1.6 GB in bfloat16
MEANS_BYTES = 16 << 30
_SHOWN = 3  # maximum number of invalid entries named in an error message


def read_means(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a `.pt` file with a dict of floating-point tensors; convert them to float32 arrays.

    The number of elements is checked before the conversion. Tensors can share memory, so without
    this check a small file could expand beyond the available memory.

    Args:
      path: a file of at most `MEANS_BYTES`.

    Returns:
      The arrays by key.

    Raises:
      UserError: as for `torchfile.read_pickle`, or the content is not a dict from strings to dense
        floating-point tensors, or the tensors have more elements in total than the file has bytes;
        the message names the file.
    """
    path = pathlib.Path(path)
    held = read_pickle(path, MEANS_BYTES, convert=False)
    torch = require("torch", f"{path}: .pt files need PyTorch")
    if not isinstance(held, dict):
        raise UserError(f"{path}: contains a {type(held).__name__}; it must contain a dict of "
                        "tensors, one per rollout")
    wrong = [key for key, value in held.items()
             if not isinstance(key, str) or not _is_dense(torch, value)]
    if wrong:
        named = ", ".join(f"{key!r:.60}" for key in wrong[:_SHOWN])
        raise UserError(f"{path}: contains invalid entries ({len(wrong)}: "
                        f"{named}{', …' if len(wrong) > _SHOWN else ''}); save the file again with "
                        "only dense floating-point tensors and string keys")
    size, total = path.stat().st_size, sum(value.numel() for value in held.values())
    if total > size:
        raise UserError(f"{path}: its tensors declare {total} elements, but the file has {size} "
                        "bytes; save each tensor with its own memory (tensor.clone())")
    # `pop` frees each tensor as soon as it is converted
    return {key: held.pop(key).detach().to(torch.float32).numpy() for key in list(held)}


def write_pickle(path: str | os.PathLike, value: Any) -> None:
    """Write a `.pt` file with `torch.save`, atomically.

    Args:
      path: the file.
      value: a nested dict of plain values and arrays; the arrays are written as float32 tensors.

    Raises:
      UserError: PyTorch is not installed, or the file cannot be written.
    """
    torch = require("torch", f"{path}: .pt files need PyTorch")

    def tensors(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.array(value, np.float32))  # a copy, with its own memory
        if isinstance(value, dict):
            return {key: tensors(item) for key, item in value.items()}
        return value

    with atomic(path) as temporary, open(temporary, "wb") as file:
        torch.save(tensors(value), file)


def _is_dense(torch: Any, value: Any) -> bool:
    """Return whether a value is a dense floating-point tensor in CPU memory."""
    return (isinstance(value, torch.Tensor) and value.layout is torch.strided
            and value.device.type == "cpu" and value.is_floating_point())
