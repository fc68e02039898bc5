"""Read and write the `.pt` files of the published Assistant Axis code that contain many tensors.

`torchfile.read_pickle` reads all files, so no code in a file is run.
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
_SHOWN = 3  # number of invalid entries that a message names


def read_means(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a `.pt` file with a dict of floating-point tensors; convert them to float32 arrays.

    The number of elements is checked before the conversion, because tensors can share memory: a
    small file could otherwise expand beyond the available memory.

    Args:
      path: a file of at most `MEANS_BYTES`.

    Returns:
      key → array.

    Raises:
      UserError: as for `torchfile.read_pickle`, or the file contains anything but a dict of text
        keys and dense floating-point tensors; the message names the file.
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
        raise UserError(f"{path}: {len(wrong)} entries are not floating-point tensors with a text "
                        f"key ({named}{', …' if len(wrong) > _SHOWN else ''}); compute the file "
                        "again")
    size, total = path.stat().st_size, sum(value.numel() for value in held.values())
    if total > size:
        raise UserError(f"{path}: its tensors declare {total} elements, but the file has {size} "
                        "bytes; save each tensor with its own memory (tensor.clone())")
    # `pop` frees each tensor after its conversion
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
    """Return whether a value is a floating-point tensor whose elements are in memory."""
    return (isinstance(value, torch.Tensor) and value.layout is torch.strided
            and value.device.type == "cpu" and value.is_floating_point())
