"""Orbax checkpoints, saved and restored shard by shard by all processes in parallel.

A folder contains `config.json` in transformers' format and the Orbax checkpoint `params`. Arrays
are keyed by their Hugging Face names, so checkpoints do not depend on this package's dataclasses.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

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
from jaxpersona.models.params import Params

if TYPE_CHECKING:
    from numpy.typing import DTypeLike
    from orbax.checkpoint import StandardCheckpointer

NAME = "params"
_MARKS = ("_METADATA", "_CHECKPOINT_METADATA")  # metadata files that Orbax writes


def holds_checkpoint(folder: str | pathlib.Path) -> bool:
    """Return whether a folder has the layout that `save` writes."""
    return any((pathlib.Path(folder) / NAME / mark).is_file() for mark in _MARKS)


def check_files(folder: pathlib.Path) -> None:
    """Check a checkpoint's files before Orbax reads them.

    Raises:
      UserError: an entry is not a regular file (reading a pipe would block), or a metadata file,
        which Orbax reads whole, is too large; the message names it.
    """
    for path in folder.rglob("*"):
        if not path.is_dir():
            require_file(path, TEXT_BYTES if path.name.startswith("_") else None)


def save(folder: str | pathlib.Path, params: Params, config: ModelConfig) -> None:
    """Write parameters, which may be on any devices, and their configuration.

    config.json is removed first and written last, so an interrupted save leaves no loadable model.

    Args:
      folder: created if missing; an existing checkpoint in it is replaced.
      params: the parameters, in the dtype to write.
      config: the model configuration.

    Raises:
      UserError: the parameters do not match the configuration, or the folder is not writable.
    """
    folder = pathlib.Path(folder).absolute()
    arrays = {name: array for name, (_, array) in names.named(params, config).items()}
    dtype = np.dtype(next(iter(arrays.values())).dtype).name
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
    """Restore a folder that `save` wrote, each shard directly onto its device.

    Args:
      folder: the folder given to `save`.
      dtype: cast to float32, bfloat16 or float16; None keeps each array's dtype.
      mesh: shards the parameters by `sharding.RULES`, independent of the sharding when saved.

    Returns:
      The parameters and their configuration.

    Raises:
      UserError: the folder is missing, not an Orbax folder or damaged, or its arrays do not match
        config.json; the message lists every mismatch.
    """
    folder = pathlib.Path(folder).absolute()
    target = None if dtype is None else parse_dtype(dtype)
    config, _ = hf.read_config(folder)
    if not holds_checkpoint(folder):
        raise UserError(f"{folder}: not an Orbax folder (no {NAME}/{_MARKS[0]})")
    check_files(folder / NAME)
    expected, tree = jax.tree.flatten(names.tensors(config))
    mesh = None if mesh is None else sharding.fit(mesh, config)
    with _checkpointer() as orbax:
        with _named_errors(folder, "the checkpoint cannot be read"):
            metadata = orbax.metadata(folder / NAME).item_metadata
            if metadata is None:
                raise UserError("its metadata is missing")
            stored = dict(metadata.tree)
        wanted = {tensor.name: tensor.spec for tensor in expected}
        faults = [f"{what}: {', '.join(sorted(names))}"
                  for what, names in (("missing", set(wanted) - set(stored)),
                                      ("extra", set(stored) - set(wanted))) if names]
        for name in sorted(set(wanted) & set(stored)):
            shape, kind = getattr(stored[name], "shape", None), getattr(stored[name], "dtype", None)
            if shape is None or tuple(shape) != wanted[name].shape:
                faults.append(f"{name}: shape {list(shape or ())}, expected "
                              f"{list(wanted[name].shape)}")
            elif kind not in DTYPES.values():
                faults.append(f"{name}: dtype {kind}; supported are float32, bfloat16 and float16")
        if faults:
            listed = "\n".join(f"  - {fault}" for fault in faults)
            raise UserError(f"{folder}: the checkpoint does not match its config.json\n{listed}")
        here = SingleDeviceSharding(sharding.default_device())
        shapes = {
            name: jax.ShapeDtypeStruct(
                spec.shape, target or stored[name].dtype,
                sharding=here if mesh is None else
                sharding.weight_sharding(spec.axes, spec.shape, mesh))
            for name, spec in wanted.items()
        }
        with _named_errors(folder, "the checkpoint cannot be read"):
            arrays = orbax.restore(folder / NAME, shapes)
    return jax.tree.unflatten(tree, [arrays[tensor.name] for tensor in expected]), config


@contextlib.contextmanager
def _checkpointer() -> Iterator[StandardCheckpointer]:
    checkpoint = require("orbax.checkpoint", "Orbax checkpoints need orbax-checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        yield checkpointer


@contextlib.contextmanager
def _named_errors(folder: pathlib.Path, what: str) -> Iterator[None]:
    """Convert any exception of Orbax or TensorStore to a UserError that names the folder."""
    try:
        yield
    except MissingPackage as error:
        raise MissingPackage(f"{folder}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: {what} ({reason or type(error).__name__})") from error
