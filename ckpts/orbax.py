"""Orbax checkpoints, saved and restored shard by shard by all processes in parallel.

A folder contains `config.json` in transformers' format and the Orbax checkpoint `params`. Arrays
are keyed by their Hugging Face names, so checkpoints do not depend on this package's dataclasses.
The values of an int8 weight are stored under the weight's name. Its scales (`Int8.scale`) and
fingerprint sums (`Int8.made_from`) are stored under this name with a suffix.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxpersona.ckpts import files, hf, names
from jaxpersona.ckpts.tensorfile import DTYPES, parse_dtype

from jaxpersona.distributed import sharding
from jaxpersona.errors import UserError
from jaxpersona.extras import MissingPackage, require
from jaxpersona.inputs import TEXT_BYTES, require_file
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.families import to_hf
from jaxpersona.models.int8 import Int8
from jaxpersona.models.params import Params

if TYPE_CHECKING:
    from numpy.typing import DTypeLike
    from orbax.checkpoint import StandardCheckpointer

NAME = "params"
_SCALE, _MADE_FROM = ".scale", ".made_from"  # suffixes of an int8 weight's additional arrays
_MARKS = ("_METADATA", "_CHECKPOINT_METADATA")  # Orbax files; either one marks a checkpoint


def holds_checkpoint(folder: str | pathlib.Path) -> bool:
    """Return whether a folder contains an Orbax checkpoint in the layout of `save`."""
    return any((pathlib.Path(folder) / NAME / mark).is_file() for mark in _MARKS)


def check_files(folder: pathlib.Path) -> None:
    """Check a checkpoint's files before Orbax reads them.

    Raises:
      UserError: a path is not a regular file (reading a pipe would block), or a metadata file is
        too large (Orbax reads it whole); the message names the path.
    """
    for path in folder.rglob("*"):
        if not path.is_dir():
            require_file(path, TEXT_BYTES if path.name.startswith("_") else None)


def save(folder: str | pathlib.Path, params: Params, config: ModelConfig) -> None:
    """Write parameters and their configuration; the parameters may be on any devices.

    config.json is removed first and written last, so an interrupted save leaves no loadable model.

    Args:
      folder: the folder to write; created if missing. An existing checkpoint is replaced.
      params: the parameters, in the dtype to write. Int8 weights stay int8.
      config: the model configuration.

    Raises:
      UserError: the parameters do not match the configuration, the folder is not writable, or
        orbax-checkpoint is not installed.
    """
    folder = pathlib.Path(folder).absolute()
    arrays: dict[str, jax.Array] = {}
    for name, (_, array) in names.named(params, config, int8=True).items():
        if isinstance(array, Int8):
            arrays |= {name: array.value, name + _SCALE: array.scale}
            if array.made_from is not None:
                arrays[name + _MADE_FROM] = array.made_from
        else:
            arrays[name] = array
    dtype = np.dtype(params.like.dtype).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    with _checkpointer() as orbax, _named_errors(folder, "cannot be written"):
        orbax.save(folder / NAME, arrays, force=True)
        orbax.wait_until_finished()
    files.write_json(folder / "config.json", {**to_hf(config), "dtype": dtype})


def load(folder: str | pathlib.Path, *, dtype: DTypeLike | None = None,
         mesh: Mesh | None = None) -> tuple[Params, ModelConfig]:
    """Load a folder that `save` wrote; each shard is restored directly onto its device.

    Args:
      folder: the folder that was passed to `save`.
      dtype: the dtype to cast to, float32, bfloat16 or float16; None keeps the stored dtypes. Int8
        weights stay int8.
      mesh: the mesh over which to shard the parameters (see `sharding.RULES`). It may differ from
        the mesh of the saved parameters.

    Returns:
      The parameters and their configuration.

    Raises:
      UserError: `dtype` or the model is not supported, the folder is missing, not an Orbax folder
        or damaged, its arrays do not match config.json (one message lists every mismatch), the mesh
        does not fit the model, a mesh is given for int8 weights with block scales, or
        orbax-checkpoint is not installed.
    """
    folder = pathlib.Path(folder).absolute()
    target = None if dtype is None else parse_dtype(dtype)
    config, _ = hf.read_config(folder)
    if not holds_checkpoint(folder):
        raise UserError(f"{folder} is not an Orbax folder; give one that contains "
                        f"{NAME}/{_MARKS[0]}")
    check_files(folder / NAME)
    expected, tree = jax.tree.flatten(names.tensors(config))
    mesh = None if mesh is None else sharding.fit(mesh, config)
    with _checkpointer() as orbax:
        with _named_errors(folder, "the checkpoint cannot be read"):
            metadata = orbax.metadata(folder / NAME).item_metadata
            if metadata is None:
                raise UserError("its metadata is missing")
            stored = dict(metadata.tree)
        wanted = {tensor.name: tensor for tensor in expected}
        parts = {name + suffix for name in wanted if _kind(stored.get(name)) == np.int8
                 for suffix in (_SCALE, _MADE_FROM)}
        faults = [f"{what}: {', '.join(sorted(names))}"
                  for what, names in (("missing arrays", set(wanted) - set(stored)),
                                      ("unexpected arrays", set(stored) - set(wanted) - parts))
                  if names]
        for name in sorted(set(wanted) & set(stored)):
            faults += _faults(wanted[name], stored)
        if faults:
            listed = "\n".join(f"  - {fault}" for fault in faults)
            raise UserError(f"{folder}: the checkpoint does not match its config.json\n{listed}")
        here = SingleDeviceSharding(sharding.default_device())

        def wish(shape: tuple[int, ...], axes: sharding.Axes, kind: Any) -> jax.ShapeDtypeStruct:
            place = here if mesh is None else sharding.weight_sharding(axes, shape, mesh)
            return jax.ShapeDtypeStruct(shape, kind, sharding=place)

        shapes = {}
        for name, tensor in wanted.items():
            shape, axes, kind = tensor.spec.shape, tensor.spec.axes, stored[name].dtype
            if kind != np.int8:
                shapes[name] = wish(shape, axes, target or kind)
                continue
            scale, out = stored[name + _SCALE], len(shape) - tensor.spec.inner
            if mesh is not None and len(scale.shape) > out:
                raise UserError(f"{folder}: contains int8 weights with block scales, which are not "
                                "supported on a mesh; omit mesh")
            shapes[name] = wish(shape, axes, kind)
            shapes[name + _SCALE] = wish(tuple(scale.shape), (*axes[:out], None)[:len(scale.shape)],
                                         scale.dtype)
            if name + _MADE_FROM in stored:
                shapes[name + _MADE_FROM] = wish((3, 2), (None, None), np.uint32)
        with _named_errors(folder, "the checkpoint cannot be read"):
            arrays = orbax.restore(folder / NAME, shapes)

    def weight(tensor: names.Tensor) -> Any:
        name = tensor.name
        if name + _SCALE not in arrays:
            return arrays[name]
        return Int8(arrays[name], arrays[name + _SCALE], arrays.get(name + _MADE_FROM),
                    inner=tensor.spec.inner)

    return jax.tree.unflatten(tree, [weight(tensor) for tensor in expected]), config


def _kind(stored: Any) -> Any:
    return getattr(stored, "dtype", None)


def _faults(tensor: names.Tensor, stored: Mapping[str, Any]) -> list[str]:
    """List the differences between a stored weight and the tensor that the model expects.

    For an int8 weight, the scales and the fingerprint sums are also checked.
    """
    def shape(name: str) -> tuple[int, ...] | None:
        found = getattr(stored.get(name), "shape", None)
        return None if found is None else tuple(found)

    name, wanted = tensor.name, tensor.spec.shape
    if shape(name) != wanted:
        return [f"{name}: shape {list(shape(name) or ())}, expected {list(wanted)}"]
    if _kind(stored[name]) in DTYPES.values():
        return []
    if _kind(stored[name]) != np.int8 or not tensor.spec.inner:
        return [f"{name}: dtype {_kind(stored[name])}, expected float32, bfloat16 or "
                "float16"]
    at = len(wanted) - tensor.spec.inner
    out, width = wanted[:at], math.prod(wanted[at:])
    scale, kind = shape(name + _SCALE), _kind(stored.get(name + _SCALE))
    blocked = scale is not None and len(scale) == at + 1 and scale[:at] == out and (
        scale[at] > 0 and width % scale[at] == 0)
    faults = []
    if kind not in DTYPES.values() or not (scale == out or blocked):
        faults.append(f"{name}{_SCALE}: {kind}{list(scale or ())}, expected a float array of "
                      f"shape {list(out)}, or with an additional axis of blocks")
    made = name + _MADE_FROM
    if made in stored and (shape(made), _kind(stored[made])) != ((3, 2), np.uint32):
        faults.append(f"{made}: {_kind(stored[made])}{list(shape(made) or ())}, expected "
                      "uint32[3, 2]")
    return faults


@contextlib.contextmanager
def _checkpointer() -> Iterator[StandardCheckpointer]:
    checkpoint = require("orbax.checkpoint", "Orbax checkpoints need orbax-checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        yield checkpointer


@contextlib.contextmanager
def _named_errors(folder: pathlib.Path, what: str) -> Iterator[None]:
    """Convert any exception in the block to a UserError with the folder, `what` and the reason."""
    try:
        yield
    except MissingPackage as error:
        raise MissingPackage(f"{folder}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: {what} ({reason or type(error).__name__})") from error
